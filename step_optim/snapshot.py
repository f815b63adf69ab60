"""Bit-exact copies of tensors, and the weights between the previous policy and the candidate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from step_optim.isolation import same_bits


class TensorCopy:
    """The bits of one tensor, and the memory that they have to go back to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.alias = tensor.detach()  # that memory, also if `.data` is swapped later
        self.bits = torch.empty_like(dense(self.alias))

    @property
    def in_place(self) -> bool:
        """Whether the tensor still lives in the memory that it had."""
        a, b = self.tensor, self.alias
        return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)

    @property
    def saved(self) -> Tensor:
        """The saved bits, in the tensor's shape."""
        if self.bits.shape == self.alias.shape:
            return self.bits
        return self.bits.as_strided(self.alias.shape, self.alias.stride())

    @property
    def unchanged(self) -> bool:
        """Whether the tensor has the saved bits, in the memory that it had."""
        return self.in_place and same_bits(dense(self.alias), self.bits)

    def restore(self) -> None:
        """Put the bits back; the tensor object and its memory are those of the capture."""
        if not self.in_place:
            self.tensor.data = self.alias
        if not same_bits(dense(self.alias), self.bits):
            dense(self.alias).copy_(self.bits)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or the memory under it if its elements overlap (an expanded tensor cannot be written)."""
    if torch._debug_has_internal_overlap(tensor) != 1:
        return tensor
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the data: of a subclass (DTensor, quantized state) or a sparse tensor, its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for part in (getattr(tensor, name) for name in names):
            if isinstance(part, Tensor):  # a DTensor names its device mesh, too
                yield from plain_tensors(part)
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout is torch.strided:
        yield tensor
    else:
        raise TypeError(f"cannot capture a tensor of layout {tensor.layout}; use a strided or COO tensor")


def shard_count(parameter: Tensor) -> int:
    """Into how many pieces a parameter is split over processes: 1 unless it is a sharded DTensor."""
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return 1
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    return math.prod(mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_shard())


class TensorStore:
    """Copies of many tensors; the buffers are kept from one capture to the next."""

    def __init__(self) -> None:
        self.copies: list[TensorCopy] = []

    def capture(self, tensors: Iterable[Tensor]) -> None:
        """Copy the bits of these tensors, each piece of memory once."""
        old = {id(copy.tensor): copy for copy in self.copies}
        unique: dict[Any, TensorCopy] = {}
        for tensor in tensors:
            copy = old.get(id(tensor))
            if copy is None or copy.tensor is not tensor or not copy.in_place:
                copy = TensorCopy(tensor)
            unique.setdefault(_memory(tensor), copy)
        self.copies = list(unique.values())
        if self.copies:
            torch._foreach_copy_([copy.bits for copy in self.copies], [dense(copy.alias) for copy in self.copies])

    def restore(self) -> None:
        """Put all bits back."""
        for copy in self.copies:
            copy.restore()


def _memory(tensor: Tensor) -> Any:
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class Weights:
    """The optimizer's parameters: the previous policy's, the candidate's, and any point between the two.

    Parameters that share memory are handled once: interpolating them twice
    would make alpha 0.5 into 0.25.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._store = TensorStore()
        self._shards_of: dict[int, int] = {}
        self._candidate: list[Tensor] | None = None

    @property
    def live(self) -> list[Tensor]:
        """The weights as they are now, wherever an optimizer has put their `.data`."""
        return [copy.tensor.detach() for copy in self._store.copies]

    @property
    def previous(self) -> list[Tensor]:
        """theta_t."""
        return [copy.saved for copy in self._store.copies]

    @property
    def candidate(self) -> list[Tensor]:
        """What the inner step proposed; known once a controller asks."""
        assert self._candidate is not None
        return self._candidate

    @property
    def parameters(self) -> list[Tensor]:
        """The parameter objects themselves, for autograd."""
        return [copy.tensor for copy in self._store.copies]

    @property
    def _shards(self) -> list[int]:
        return [self._shards_of[id(copy.tensor)] for copy in self._store.copies]

    @torch.no_grad()
    def capture(self) -> bool:
        """Take the current weights as theta_t. True if they were it already, bit for bit."""
        self._candidate = None
        parameters = list(self._parameters())
        known = {id(copy.tensor) for copy in self._store.copies}
        unique = {_memory(p): p for p in reversed(parameters)}
        if known == {id(p) for p in unique.values()} and all(copy.unchanged for copy in self._store.copies):
            return True
        self._store.capture(parameters)
        return False

    def _parameters(self) -> Iterator[Tensor]:
        self._shards_of = {}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                for plain in plain_tensors(parameter):
                    self._shards_of[id(plain)] = shard_count(parameter)
                    yield plain

    def of(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A plain parameter as it is, at theta_t, and at the candidate."""
        place = _memory(parameter)
        index = next(i for i, copy in enumerate(self._store.copies) if _memory(copy.tensor) == place)
        return self.live[index], self.previous[index], self.candidate[index]

    @torch.no_grad()
    def update(self) -> tuple[bool, float]:
        """Whether any bit differs from theta_t, and the square of the difference's L2 norm (NaN or inf if need be).

        Each square counts once for every shard of its parameter, and a whole
        parameter once: summed over processes and divided by their number, it
        is that of the policy.
        """
        square = 0.0
        moved = False
        for live, previous, shards in zip(self.live, self.previous, self._shards, strict=True):
            if same_bits(live, previous):
                continue
            moved = True
            wide = torch.complex128 if live.is_complex() else torch.float64
            difference = (live.to(wide) - previous) if live.element_size() == 2 else live - previous
            if not difference.isfinite().all():  # an infinity that was there before has not moved
                difference = difference.masked_fill(live == previous, 0)
            square += shards * float(torch.linalg.vector_norm(difference.flatten(), dtype=wide)) ** 2
        return moved, square

    @torch.no_grad()
    def keep_candidate(self) -> None:
        """Remember the current weights as the candidate, once a step."""
        if self._candidate is None:
            self._candidate = [live.clone() for live in self.live]

    @torch.no_grad()
    def go(self, alpha: float) -> None:
        """Write theta_t + alpha (candidate - theta_t); exactly theta_t at 0 and exactly the candidate at 1."""
        if alpha == 0:
            self._store.restore()
            return
        for live, previous, candidate in zip(self.live, self.previous, self.candidate, strict=True):
            live.copy_(candidate if alpha == 1 else torch.lerp(previous, candidate, alpha))

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Write these weights, one tensor for each of `live`."""
        for live, value in zip(self.live, values, strict=True):
            live.copy_(value)

    @torch.no_grad()
    def alignment(self) -> tuple[float, float]:
        """<current - theta_t, candidate - theta_t> and ‖candidate - theta_t‖², counted as in `update`."""
        along = length = 0.0
        for live, previous, candidate, shards in zip(
            self.live, self.previous, self.candidate, self._shards, strict=True
        ):
            wide = torch.complex128 if live.is_complex() else torch.float64
            step, way = (live.to(wide) - previous).flatten(), (candidate.to(wide) - previous).flatten()
            along += shards * float(torch.vdot(way, step).real)
            length += shards * float(torch.vdot(way, way).real)
        return along, length

    def restore(self) -> None:
        """Put theta_t back, bit for bit."""
        with torch.no_grad():
            self._store.restore()
