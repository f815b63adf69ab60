"""The weights between the previous policy and the candidate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from step_optim.snapshot.store import TensorStore
from step_optim.snapshot.tensors import (
    TensorCopy,
    any_of,
    differs,
    digest,
    is_synchronous,
    memory,
    plain_tensors,
    shard_count,
)


class Update:
    """How far the weights are from theta_t. An accelerator may still be measuring when this is made."""

    def __init__(self, differences: Sequence[bool | Tensor], squares: Sequence[Tensor]) -> None:
        self._moved = [d for d in differences if isinstance(d, bool)]
        self._figures = [*squares, *(d for d in differences if isinstance(d, Tensor))]
        self._squares = len(squares)

    def read(self) -> tuple[bool, float]:
        """Whether any bit differs, and the square of the difference's L2 norm (NaN or inf if need be)."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for figure in self._figures:
            by_device.setdefault(figure.device, []).append(figure)
        read = {
            id(f): v
            for fs in by_device.values()
            for f, v in zip(fs, torch.stack([f.double() for f in fs]).tolist(), strict=True)
        }
        values = [read[id(figure)] for figure in self._figures]
        moved = any(self._moved) or any(values[self._squares :])
        return moved, sum(values[: self._squares]) if moved else 0.0


class Weights:
    """The optimizer's parameters: the previous policy's, the candidate's, and any point between the two.

    Parameters that share memory are handled once: interpolating them twice
    would make alpha 0.5 into 0.25.

    Args:
        optimizer: whose parameters these are.
        host: keep both copies of a CUDA device's weights in pinned host memory.
    """

    def __init__(self, optimizer: Optimizer, *, host: bool = False) -> None:
        self._optimizer, self._host = optimizer, host
        self._captured: list[Tensor] = []
        self._store, self._candidate = TensorStore(host=host), TensorStore(host=host)
        self._has_candidate = False
        self._shards_of: dict[int, int] = {}
        self._whole: dict[int, Tensor] = {}
        """The DTensors that this process has parts of, by the ids of the parts."""
        self._spared: frozenset[int] = frozenset()
        """Ids of the tensors that are spared."""

    @property
    def _copies(self) -> list[TensorCopy]:
        """One copy per storage: the candidate's, once it is known; the inner step may un-share tied tensors."""
        return (self._candidate if self._has_candidate else self._store).copies

    @property
    def live(self) -> list[Tensor]:
        """The weights as they are now, wherever an optimizer has put their `.data`."""
        return [copy.tensor.detach() for copy in self._copies]

    @property
    def previous(self) -> list[Tensor]:
        """theta_t."""
        return [self._store.saved(copy.tensor) for copy in self._copies]

    @property
    def candidate(self) -> list[Tensor]:
        """What the inner step proposed; known once a controller asks."""
        assert self._has_candidate
        return [copy.saved for copy in self._copies]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameter objects themselves, for autograd: of a sharded one the DTensor, not this process's part."""
        return [self._whole.get(id(copy.tensor), copy.tensor) for copy in self._copies]

    @torch.no_grad()
    def capture(self) -> bool | Tensor:
        """Take the current weights as theta_t. Tells whether they were other ones, in any bit; see `differs`."""
        self._has_candidate = False
        self._captured = list(self._parameters())
        changed = True if not self._store.covers(self._captured) else self._store.changed()
        if self._host:  # to copy is worse than to wait
            changed = bool(changed)
        if changed is not False:
            self._store.capture(self._captured, self._shards)
        return changed

    def remember(self, *, as_proposed: bool) -> None:
        """Take the current weights as theta_t of the next step, which will find out whether they are it still.

        Args:
            as_proposed: these are the candidate's, of which there may be a copy already.
        """
        if as_proposed and self._has_candidate:
            self._store, self._candidate = self._candidate, self._store
        else:
            self._store.capture(self._captured, self._shards)
        self._has_candidate = False

    def _shards(self, parameter: Tensor) -> int:
        return self._shards_of[id(parameter)]

    def digest(self) -> int:
        """A number that tells these weights, as they are now, from others; see `tensors.digest`."""
        return digest(parameter.detach() for parameter in self._parameters())

    def _parameters(self) -> Iterator[Tensor]:
        self._shards_of, self._whole = {}, {}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                for plain in plain_tensors(parameter):
                    self._shards_of[id(plain)] = shard_count(parameter)
                    if hasattr(parameter, "placements"):
                        self._whole[id(plain)] = parameter
                    yield plain

    def place_of(self, parameter: Tensor) -> int:
        """Where a plain parameter is in `previous`."""
        place = memory(parameter)
        return next(i for i, copy in enumerate(self._copies) if memory(copy.tensor) == place)

    def places(self) -> list[list[int]]:
        """Where the parts of each of the optimizer's parameters are in `previous`, group after group."""
        found = {memory(copy.tensor): i for i, copy in enumerate(self._copies)}
        parameters = (p for group in self._optimizer.param_groups for p in group["params"])
        return [[found[memory(plain)] for plain in plain_tensors(parameter)] for parameter in parameters]

    def spare(self, parameters: Sequence[Tensor]) -> None:
        """Let the parts of some parameters stay at the candidate, which is known, wherever the others go."""
        self._spared = frozenset(id(plain) for parameter in parameters for plain in plain_tensors(parameter))

    @property
    def spared(self) -> list[int]:
        """The places of what stays at the candidate."""
        return [i for i, copy in enumerate(self._copies) if self._is_spared(copy)] if self._spared else []

    def _is_spared(self, copy: TensorCopy) -> bool:
        return id(copy.tensor) in self._spared

    @torch.no_grad()
    def put_spared(self) -> None:
        """Write the candidate's weights where they are spared."""
        if self._spared:
            self._candidate.wait()
        for copy in self._copies if self._spared else ():
            if self._is_spared(copy):
                copy.put_back()
                copy.tensor.detach().copy_(copy.saved)

    @property
    def spared_is_finite(self) -> bool:
        """Whether the update of all that is spared is finite."""
        spared = set(self.spared)
        return all(math.isfinite(float(square(b, a))) for i, (a, b, _) in enumerate(self.ends()) if i in spared)

    @torch.no_grad()
    def moved(self) -> bool:
        """Whether any weight that is not spared has other bits than at theta_t."""
        others = (copy for copy in self._copies if not self._is_spared(copy))
        return bool(any_of(differs(copy.tensor.detach(), self._store.saved(copy.tensor)) for copy in others))

    def of(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tensor at a place as it is, at theta_t, and at the candidate."""
        copy = self._copies[place]
        return copy.tensor.detach(), self._store.saved(copy.tensor), copy.saved

    def names(self, named: Mapping[str, Tensor]) -> dict[str, int | None]:
        """Where named parameters are in `previous`; None of those that the optimizer does not move."""
        places = {memory(copy.tensor): i for i, copy in enumerate(self._copies)}
        found = {name: [places.get(memory(plain)) for plain in plain_tensors(p)] for name, p in named.items()}
        return {name: next((i for i in where if i is not None), None) for name, where in found.items()}

    @torch.no_grad()
    def update(self) -> Update:
        """Compare the weights with theta_t.

        Each square counts once for every shard of its parameter, and a whole
        parameter once: summed over processes and divided by their number, it
        is that of the policy.
        """
        differences, squares = [], []
        for now, previous, shards in self._differences():
            if now.is_meta:  # no bits that could differ
                continue
            moved = square(now, previous)
            sure = is_synchronous(now) and bool(moved > 0)  # else 0.0 may have become -0.0
            squares.append(shards * moved)
            differences.append(sure or differs(now, previous))
        return Update(differences, squares)

    def _differences(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        if self._store.in_place:
            yield from self._store.pairs()
            return
        distinct = {memory(tensor): tensor for tensor in self._captured}  # somebody has put `.data` somewhere else
        for tensor in distinct.values():
            now, previous = tensor.detach(), self._store.saved(tensor)
            _check_kind(now, previous)
            yield now, previous, self._shards(tensor)

    @torch.no_grad()
    def keep_candidate(self, *, aside: bool = False) -> None:
        """Remember the current weights as the candidate, once a step; see `TensorStore.capture` for ``aside``."""
        if not self._has_candidate:
            self._candidate.capture(self._captured, self._shards, aside=aside)
            self._has_candidate = True

    @contextmanager
    def copied_aside(self) -> Iterator[None]:
        """During an audit, which writes no weights, copy the candidate to the host: the next theta_t, most likely."""
        if self._host:
            self.keep_candidate(aside=True)
        yield
        self._candidate.wait()

    @torch.no_grad()
    def go(self, parts: float | Sequence[float]) -> None:
        """Write theta_t + part (candidate - theta_t); exactly theta_t at 0 and exactly the candidate at 1.

        Args:
            parts: of all tensors, or one for each of `previous`. Of those that are spared it is 1.
        """
        if parts == 0:
            self._store.restore()
            self.put_spared()
            return
        self._candidate.put_back()
        for i, copy in enumerate(self._copies):
            part = 1 if self._is_spared(copy) else parts if isinstance(parts, (int, float)) else parts[i]
            there, previous = copy.saved, self._store.saved(copy.tensor)
            copy.tensor.detach().copy_(there if part == 1 else torch.lerp(previous, there, part))

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Write these weights, one tensor for each of `live`; what is spared gets the candidate's."""
        self._candidate.put_back()
        for copy, value in zip(self._copies, values, strict=True):
            copy.tensor.detach().copy_(copy.saved if self._is_spared(copy) else value)

    @property
    def is_coarse(self) -> bool:
        """Whether some weights are of a dtype that has few numbers between theta_t and the candidate."""
        tensors = (copy.tensor for copy in self._copies if not self._is_spared(copy))
        return any(tensor.is_floating_point() and tensor.element_size() < 4 for tensor in tensors)

    def ends(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield (theta_t, the candidate, shards) of each piece of memory."""
        assert self._has_candidate
        for copy in self._copies:
            yield self._store.saved(copy.tensor), copy.saved, self._shards(copy.tensor)

    def proposal(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (theta_t, the candidate) of each piece of memory; in place is the candidate, if it was not kept."""
        for copy in self._copies:
            yield self._store.saved(copy.tensor), copy.saved if self._has_candidate else copy.tensor.detach()

    @torch.no_grad()
    def squares(self) -> list[float]:
        """‖candidate - theta_t‖² of each of `previous`, counted as in `update`; 0 of what is spared."""
        found = [shards * float(square(candidate, previous)) for previous, candidate, shards in self.ends()]
        return [0.0 if self._is_spared(copy) else each for copy, each in zip(self._copies, found, strict=True)]

    @torch.no_grad()
    def alignment(self, *, spared: bool = True) -> tuple[float, float]:
        """<current - theta_t, candidate - theta_t> and ‖candidate - theta_t‖², counted as in `update`.

        Args:
            spared: whether what is spared counts.
        """
        products: dict[torch.device, list[Tensor]] = {}
        for copy in self._copies:
            if not spared and self._is_spared(copy):
                continue
            live, previous = copy.tensor.detach(), self._store.saved(copy.tensor)
            wide = torch.complex128 if live.is_complex() else torch.float64
            step, way = (live.to(wide) - previous).flatten(), (copy.saved.to(wide) - previous).flatten()
            both = torch.stack([torch.vdot(way, step).real, torch.vdot(way, way).real])
            products.setdefault(live.device, []).append(both * self._shards(copy.tensor))
        if not products:
            return 0.0, 0.0
        along, length = zip(*(torch.stack(part).sum(0).tolist() for part in products.values()), strict=True)
        return sum(along), sum(length)

    @torch.no_grad()
    def inner(self, pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[float]:
        """<a, b> of pairs of points, a tensor for each of `previous`, in float64; counted as in `update`."""
        shards = [self._shards(copy.tensor) for copy in self._copies]
        return [math.fsum(n * _product(x, y) for n, x, y in zip(shards, a, b, strict=True)) for a, b in pairs]

    @torch.no_grad()
    def descent(self) -> tuple[float, float]:
        """-<g, current - theta_t> and -<g, candidate - theta_t>; g is in ``.grad``. Counted as in `update`."""
        gradients = {
            id(plain): grad
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.layout is torch.strided
            for plain, grad in zip(plain_tensors(parameter), plain_tensors(parameter.grad), strict=True)
        }
        kept = proposed = 0.0
        for copy in self._copies:
            if id(copy.tensor) not in gradients:
                continue
            g, previous, shards = gradients[id(copy.tensor)], self._store.saved(copy.tensor), self._shards(copy.tensor)
            wide = torch.complex128 if g.is_complex() else torch.float64
            kept -= shards * _product(g, copy.tensor.detach().to(wide) - previous)
            proposed -= shards * _product(g, copy.saved.to(wide) - previous)
        return kept, proposed

    def restore(self) -> None:
        """Put theta_t back, bit for bit."""
        self._candidate.wait()
        with torch.no_grad():
            self._store.restore()


def _product(x: Tensor, y: Tensor) -> float:
    """Re <x, y>, in float64."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    return float(torch.vdot(x.detach().to(wide).flatten(), y.detach().to(wide).flatten()).real)


def _check_kind(now: Tensor, previous: Tensor) -> None:
    """Refuse `.data` between which and theta_t there is no line."""
    kinds = [(str(t.dtype).removeprefix("torch."), tuple(t.shape), str(t.device)) for t in (previous, now)]
    if kinds[0] != kinds[1]:
        was, became = (f"{dtype} of shape {shape} on {device}" for dtype, shape, device in kinds)
        raise RuntimeError(
            f"the inner step put a weight's .data from {was} to {became}: no part of such a step can be taken. Change "
            "dtype, shape or device of weights between two steps, or make the optimizer write into them"
        )


IN_CACHE = 2**17
"""Elements that a CPU subtracts at once: a temporary of the size of all weights costs more than the arithmetic."""


def square(now: Tensor, previous: Tensor) -> Tensor:
    """‖now - previous‖², 0-dim float64; what did not move counts as 0, be it infinite."""
    if not is_synchronous(now) or now.dim() != 1:
        return _square_of(now, previous)
    pieces = zip(now.split(IN_CACHE), previous.split(IN_CACHE), strict=True)  # type: ignore[no-untyped-call]
    return torch.stack([_square_of(a, b) for a, b in pieces]).sum()


def _square_of(now: Tensor, previous: Tensor) -> Tensor:
    if now.is_floating_point() and now.element_size() < 4:
        now, previous = now.float(), previous.float()
    elif not (now.is_floating_point() or now.is_complex()):
        now, previous = now.double(), previous.double()
    wide: Any = torch.complex128 if now.is_complex() else torch.float64
    norm: Tensor = torch.linalg.vector_norm(now - previous, dtype=wide)
    if not is_synchronous(now) or not bool(norm.isfinite()):
        stayed = (now == previous) | (now.isnan() & previous.isnan())
        norm = torch.linalg.vector_norm(torch.where(stayed, 0, now - previous), dtype=wide)
    return norm.double().square()
