"""Copies of many tensors at once, in buffers that are allocated once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from operator import is_
from typing import Any

import torch
from torch import Tensor

from step_optim.snapshot.tensors import (
    Located,
    Memory,
    TensorCopy,
    any_of,
    as_bits,
    dense,
    differs,
    memory,
    places,
    signs,
)

CHUNK = {"cpu": 2**22, "cuda": 2**25}
"""Elements that are compared at once; smaller tensors are put together up to this many."""

SMALL = 2**26
"""Bytes of buffers that are kept although nothing is in them: gradients lie elsewhere in every step."""


class TensorStore:
    """Copies of many tensors.

    Tensors that share memory are one copy, the first one's. The copies of
    small tensors lie one after another in flat buffers, so that a capture or a
    comparison is a few operations and not a few for each tensor. Buffers and
    the plan of what lies where are used again for other tensors of the same
    kinds: shapes, strides, dtypes, devices.

    Args:
        host: keep the copies of a CUDA device's tensors in pinned host memory.
    """

    def __init__(self, *, host: bool = False) -> None:
        self.copies: list[TensorCopy] = []
        self._host = host
        self._tensors: list[Tensor] = []
        self._sources: list[Located] = []
        self._places: Any = None
        self._copy_of: dict[int, TensorCopy] = {}
        self._buckets: list[_Bucket] = []
        self._ordered: list[TensorCopy] = []
        self._planned: list[_Bucket] = []
        """Buckets of the plan, which is kept when the tensors are let go."""
        self._kinds: Any = None
        """Of the tensors that the plan is for, in the order of the copies; None if some share memory. See `_kinds`."""
        self._aside: Any = None
        """The stream on which a copy may still be going on."""

    def covers(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the copies are of these very tensors, each in the memory that it had."""
        return len(tensors) == len(self._sources) and all(map(is_, tensors, self._tensors)) and self.in_place

    @torch.no_grad()
    def capture(
        self,
        tensors: Iterable[Tensor],
        group: Callable[[Tensor], Hashable] = lambda _: None,
        *,
        aside: bool = False,
    ) -> None:
        """Copy the bits of these tensors, each piece of memory once.

        Args:
            tensors: what is copied.
            group: tensors of different groups are not compared as one; see `pairs`.
            aside: let a copy to the host go on beside what the device does
                next. `wait` before anything writes into the tensors.
        """
        tensors = list(tensors)
        self.wait()
        if not self.covers(tensors) and not self._aim(tensors, group):
            self._plan(tensors, group)
        with self._stream(tensors) if aside and self._host else nullcontext():
            for bucket in self._buckets:
                bucket.fill()

    def _stream(self, tensors: Sequence[Tensor]) -> AbstractContextManager[Any]:
        if not any(tensor.is_cuda for tensor in tensors):
            return nullcontext()
        self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._aside.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._aside)

    def wait(self) -> None:
        """Let the device finish a copy before it does anything else. The host does not wait."""
        if self._aside is not None:
            torch.cuda.current_stream().wait_stream(self._aside)
            self._aside = None

    def _plan(self, tensors: list[Tensor], group: Callable[[Tensor], Hashable]) -> None:
        self._sources = []  # until all of it is in place
        seen: dict[Hashable, Tensor] = {}
        for tensor in tensors:
            seen.setdefault(memory(tensor), tensor)  # the first of those that share memory
        alike: dict[Hashable, list[Tensor]] = {}
        for tensor in seen.values():
            alike.setdefault((tensor.device, tensor.dtype, group(tensor)), []).append(tensor)
        self._buckets = [
            _Bucket(part, group(part[0]), host=self._host) for every in alike.values() for part in _parts(every)
        ]
        scratch: dict[Any, _Scratch] = {}
        for bucket in self._buckets:
            bucket.share(scratch)
        copies = {id(copy.tensor): copy for bucket in self._buckets for copy in bucket.copies}
        self._copy_of = {id(tensor): copies[id(seen[memory(tensor)])] for tensor in tensors}
        self.copies = [copies[id(tensor)] for tensor in seen.values()]
        self._tensors, self._places = tensors, places(tensors)
        self._sources = [copies.get(id(tensor)) or Located(tensor) for tensor in tensors]
        kinds = None if len(self.copies) < len(tensors) else _kinds(tensors, group)
        self._planned, self._ordered, self._kinds = self._buckets, self.copies, kinds  # an interrupt finds all or none

    def _aim(self, tensors: list[Tensor], group: Callable[[Tensor], Hashable]) -> bool:
        """Keep the plan for tensors of the same kinds in other memory; whether that can be done."""
        if self._kinds is None or _kinds(tensors, group) != self._kinds or _share_memory(tensors):
            return False
        self._sources, self.copies = [], []  # until all of it is in place
        for copy, tensor, at in zip(self._ordered, tensors, Memory.of_all(tensors), strict=True):
            copy.aim(tensor, at)
        self._buckets = self._planned
        for bucket in self._buckets:
            bucket.aim()
        self._copy_of = dict(zip(map(id, tensors), self._ordered, strict=True))
        self._tensors, self._places = tensors, places(tensors)
        self.copies, self._sources = self._ordered, list(self._ordered)
        return True

    def forget(self) -> None:
        """Let the tensors go; small buffers are kept, for others of the same kinds."""
        self.copies, self._tensors, self._sources, self._copy_of, self._buckets = [], [], [], {}, []
        if self._kinds is None or sum(bucket.flat.nbytes for bucket in self._planned) > SMALL:
            self._kinds, self._ordered, self._planned = None, [], []
        for bucket in self._planned:
            bucket.forget()

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Yield (elements now, the saved ones, group), flat and `CHUNK` at a time; for tensors that are in place."""
        self.wait()
        for bucket in self._buckets:
            for now, saved in bucket.pairs():
                yield now, saved, bucket.group

    def saved(self, tensor: Tensor) -> Tensor:
        """The bits that a captured tensor had, in its shape and on its device."""
        return self._copy_of[id(tensor)].saved

    def copy_of(self, tensor: Tensor) -> TensorCopy | None:
        """The copy of a tensor, or of what it shares memory with; None of one that was not captured."""
        return self._copy_of.get(id(tensor))

    @property
    def in_place(self) -> bool:
        """Whether all tensors live in the memory that they had."""
        return not self._sources or places(self._tensors) == self._places

    @torch.no_grad()
    def changed(self) -> bool | Tensor:
        """Whether any tensor that is in place has other bits than the saved ones; see `differs`."""
        return any_of(differs(now, saved) for now, saved, _ in self.pairs())

    @torch.no_grad()
    def restore(self) -> None:
        """Put all bits back, into the memory where they were."""
        self.put_back()
        for bucket in self._buckets:
            bucket.restore()

    def put_back(self) -> None:
        """Let all tensors live in the memory that they had, whatever is in it."""
        self.wait()
        for source in self._sources:
            source.put_back()


def _kinds(tensors: Sequence[Tensor], group: Callable[[Tensor], Hashable]) -> Any:
    """What has to be equal for a plan to serve other tensors."""
    # Of a tensor that overlaps, all memory is copied.
    sizes = [0 if tensor.is_contiguous() else tensor.untyped_storage().nbytes() for tensor in tensors]
    return places(tensors)[1:], signs(tensors), [tensor.device for tensor in tensors], sizes, list(map(group, tensors))


def _share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether two of these tensors begin at one place. Two empty ones do: they are planned anew."""
    return len({tensor.data_ptr() for tensor in tensors}) < len(tensors)


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list where `CHUNK` elements are together."""
    part: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if part and size + tensor.numel() > chunk_of(tensor):
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.numel()
    yield part


class _Bucket:
    """Tensors of one device and dtype, whose copies lie one after another."""

    def __init__(self, tensors: list[Tensor], group: Hashable, *, host: bool) -> None:
        self.group, self._host = group, host
        places = [dense(tensor) for tensor in tensors]
        size, like = sum(tensor.numel() for tensor in places), places[0]
        pinned = host and like.is_cuda
        device = torch.device("cpu") if pinned else like.device
        self.flat = torch.empty(size, dtype=like.dtype, device=device, pin_memory=pinned)
        self.copies = [
            TensorCopy(tensor, bits) for tensor, bits in zip(tensors, _views(self.flat, places), strict=True)
        ]
        self._bits = [copy.bits for copy in self.copies]
        self._live = places
        self._scratch = _Scratch()
        self._views: list[Tensor] = []

    def aim(self) -> None:
        """Take the tensors that the copies are of now."""
        self._live = [dense(copy.tensor) for copy in self.copies]

    def forget(self) -> None:
        """Let the tensors go."""
        self._live = []
        for copy in self.copies:
            copy.let_go()

    def share(self, scratch: dict[Any, _Scratch]) -> None:
        """Gather into the same memory as others of this device and dtype."""
        self._scratch = scratch.setdefault((self._live[0].device, self._live[0].dtype), _Scratch())
        self._scratch.size = max(self._scratch.size, len(self.flat))

    def fill(self) -> None:
        """Take the bits as they are now."""
        torch._foreach_copy_(self._bits, self._live, non_blocking=True)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (elements now, the saved ones), some at a time."""
        every = self._all()
        size = chunk_of(every)
        for now, saved in zip(every.split(size), self.flat.split(size), strict=True):  # type: ignore[no-untyped-call]
            yield now, saved.to(now.device, non_blocking=True)

    def restore(self) -> None:
        """Put back the bits that have changed; an unneeded write would look like an outside edit."""
        if not any(differs(now, saved) for now, saved in self.pairs()):
            return
        changed = self._changed()
        torch._foreach_copy_([self._live[i] for i in changed], [self._bits[i] for i in changed], non_blocking=True)

    def _changed(self) -> list[int]:
        """Which tensors have other bits than the saved ones, found in a few operations for all of them."""
        if len(self._live) == 1:
            return [0]
        every = self._all()
        different = as_bits(every) != as_bits(self.flat.to(every.device))
        counts = different.reshape(len(every), -1).any(1).cumsum(0, dtype=torch.int32)
        ends = list(accumulate(tensor.numel() for tensor in self._live))
        so_far = [0, *(counts[[end - 1 for end in ends if end > 0]].tolist() if len(counts) else [])]
        so_far = [0] * (len(ends) + 1 - len(so_far)) + so_far  # empty tensors at the beginning
        return [i for i, (before, after) in enumerate(pairwise(so_far)) if after > before]

    def _all(self) -> Tensor:
        """All elements one after another, in memory that the next bucket writes over; a single tensor lies there."""
        live = self._live[0]
        if len(self._live) == 1 and _without_gaps(live):
            return live.as_strided((live.numel(),), (1,))
        flat = self._scratch.like(live)[: len(self.flat)]
        if not self._views:
            self._views = _views(flat, self._live)
        torch._foreach_copy_(self._views, self._live)
        return flat


class _Scratch:
    """Memory that buckets gather their tensors into, one after another."""

    size = 0
    _flat: Tensor | None = None

    def like(self, tensor: Tensor) -> Tensor:
        """Return it; it is allocated when it is first needed."""
        if self._flat is None:
            self._flat = torch.empty(self.size, dtype=tensor.dtype, device=tensor.device)
        return self._flat


def _views(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cut a flat tensor into the shapes of these, with their strides if they have no gaps."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return list(torch._C._nn.unflatten_dense_tensors(flat, list(tensors)))
    parts = flat.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
    return [
        part.as_strided(tensor.shape, tensor.stride()) if _without_gaps(tensor) else part.view(tensor.shape)
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def _without_gaps(tensor: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor)) and not tensor.is_conj() and not tensor.is_neg()


def chunk_of(tensor: Tensor) -> int:
    """`CHUNK` of its device."""
    return CHUNK.get(tensor.device.type, CHUNK["cuda"])
