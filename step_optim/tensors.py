"""Bit-exact copies of many tensors, in buffers that are allocated once."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from step_optim.isolation import BITS, same_bits

CHUNK = {"cpu": 2**22, "cuda": 2**25}
"""Elements that are compared at once; smaller tensors are put together up to this many."""


AT_ONCE = ("cpu", "meta")
"""Devices whose results can be looked at without waiting for anything."""

SMALL = 2**26
"""Bytes of buffers that are kept although nothing is in them: gradients lie elsewhere in every step."""


class TensorCopy:
    """The bits of one tensor, and the memory that they have to go back to.

    Args:
        tensor: what is copied.
        bits: where to; a tensor of its own by default.
    """

    def __init__(self, tensor: Tensor, bits: Tensor | None = None) -> None:
        self.tensor = tensor
        self.alias = tensor.detach()  # that memory, also if `.data` is swapped later
        self.dense = dense(self.alias)
        self.bits = torch.empty_like(self.dense) if bits is None else bits

    @property
    def in_place(self) -> bool:
        """Whether the tensor still lives in the memory that it had."""
        return place(self.tensor) == place(self.alias)

    @property
    def saved(self) -> Tensor:
        """The saved bits, in the tensor's shape and on its device."""
        bits = self.bits.to(self.alias.device)
        return bits if bits.shape == self.alias.shape else bits.as_strided(self.alias.shape, self.alias.stride())

    @property
    def unchanged(self) -> bool:
        """Whether the tensor has the saved bits, in the memory that it had."""
        return self.in_place and same_bits(self.dense, self.bits.to(self.alias.device))

    def restore(self) -> None:
        """Put the bits back; the tensor object and its memory are those of the capture."""
        if not self.in_place:
            self.tensor.data = self.alias
        bits = self.bits.to(self.alias.device)
        if not same_bits(self.dense, bits):  # an unneeded write would look like an outside edit
            self.dense.copy_(bits)


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's elements are in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def memory(tensor: Tensor) -> Hashable:
    """Equal for tensors that are the same memory."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return id(tensor)
    return tensor.device, *place(tensor)


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or the memory under it if its elements overlap (an expanded tensor cannot be written)."""
    if tensor.is_contiguous() or torch._debug_has_internal_overlap(tensor) != 1:
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
    """Copies of many tensors.

    The copies of small tensors lie one after another in flat buffers, so that
    a capture or a comparison is a few operations and not a few for each tensor.
    Buffers, and the plan of what lies where, are kept as long as the tensors
    and their places stay the same.

    Args:
        host: keep the copies of a CUDA device's tensors in pinned host memory.
    """

    def __init__(self, *, host: bool = False) -> None:
        self.copies: list[TensorCopy] = []
        self._host = host
        self._sources: list[_Source] = []
        self._buckets: list[_Bucket] = []
        self._spare: list[Tensor] = []
        self._aside: Any = None
        """The stream on which a copy may still be going on."""

    def covers(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the copies are of these very tensors, each in the memory that it had."""
        return len(tensors) == len(self._sources) and all(
            tensor is source.tensor and source.in_place for tensor, source in zip(tensors, self._sources, strict=True)
        )

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
        if not self.covers(tensors):
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
        unique = list(seen.values())
        alike: dict[Hashable, list[Tensor]] = {}
        for tensor in unique:
            alike.setdefault((tensor.device, tensor.dtype, group(tensor)), []).append(tensor)
        self._buckets = [
            _Bucket(part, group(part[0]), self._spare, host=self._host)
            for every in alike.values()
            for part in _parts(every)
        ]
        scratch: dict[Any, _Scratch] = {}
        for bucket in self._buckets:
            bucket.share(scratch)
        copies = {id(copy.tensor): copy for bucket in self._buckets for copy in bucket.copies}
        self.copies = [copies[id(tensor)] for tensor in unique]
        self._spare = []
        self._sources = [_Source(tensor) for tensor in tensors]

    def forget(self) -> None:
        """Let the tensors go; small buffers are kept, for others of the same sizes."""
        small = sum(bucket.flat.nbytes for bucket in self._buckets) <= SMALL
        self._spare = [bucket.flat for bucket in self._buckets] if small else []
        self.copies, self._sources, self._buckets = [], [], []

    def pairs(self) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Yield (elements now, the saved ones, group), flat and `CHUNK` at a time; for tensors that are in place."""
        self.wait()
        for bucket in self._buckets:
            for now, saved in bucket.pairs():
                yield now, saved, bucket.group

    def changed(self) -> bool | Tensor:
        """Whether any tensor has other bits than the saved ones, or another place; see `differs`."""
        if not all(source.in_place for source in self._sources):
            return True
        return any_of(differs(now, saved) for now, saved, _ in self.pairs())

    @property
    def unchanged(self) -> bool:
        """Whether all tensors have the saved bits, in the memory that they had."""
        return not bool(self.changed())

    def restore(self) -> None:
        """Put all bits back, into the memory where they were."""
        self.wait()
        for source in self._sources:
            source.put_back()
        for copy in self.copies:
            copy.restore()


class _Source:
    """A tensor that was captured, and its memory; tensors that share memory are several sources of one copy."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._alias = tensor, tensor.detach()
        self._place = place(self._alias)

    @property
    def in_place(self) -> bool:
        return place(self.tensor) == self._place

    def put_back(self) -> None:
        if not self.in_place:
            self.tensor.data = self._alias


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

    def __init__(self, tensors: list[Tensor], group: Hashable, spare: Sequence[Tensor], *, host: bool) -> None:
        self.group, self._host = group, host
        aliases = [dense(tensor.detach()) for tensor in tensors]
        size, like = sum(alias.numel() for alias in aliases), aliases[0]
        pinned = host and like.is_cuda
        device = torch.device("cpu") if pinned else like.device
        fitting = (old for old in spare if (old.numel(), old.dtype, old.device) == (size, like.dtype, device))
        free = next(fitting, None)
        self.flat = torch.empty(size, dtype=like.dtype, device=device, pin_memory=pinned) if free is None else free
        self.copies = [
            TensorCopy(tensor, bits) for tensor, bits in zip(tensors, _views(self.flat, aliases), strict=True)
        ]
        self._live = [copy.dense for copy in self.copies]
        self._scratch = _Scratch()
        self._views: list[Tensor] = []

    def share(self, scratch: dict[Any, _Scratch]) -> None:
        """Gather into the same memory as others of this device and dtype."""
        self._scratch = scratch.setdefault((self._live[0].device, self._live[0].dtype), _Scratch())
        self._scratch.size = max(self._scratch.size, len(self.flat))

    def fill(self) -> None:
        """Take the bits as they are now."""
        torch._foreach_copy_([copy.bits for copy in self.copies], self._live, non_blocking=True)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (elements now, the saved ones), some at a time."""
        every = self._all()
        size = chunk_of(every)
        for now, saved in zip(every.split(size), self.flat.split(size), strict=True):  # type: ignore[no-untyped-call]
            yield now, saved.to(now.device, non_blocking=True)

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


def at_once(tensor: Tensor) -> bool:
    """Whether its device can be looked at without waiting."""
    return tensor.device.type in AT_ONCE


def differs(a: Tensor, b: Tensor) -> bool | Tensor:
    """Whether two flat tensors differ in any bit; an accelerator answers with a tensor, without waiting."""
    if a.device.type == "meta":
        return False
    a, b = as_bits(a), as_bits(b)
    if not at_once(a):
        return (a != b).any()
    if all(x.is_contiguous() and x.nbytes % 8 == 0 and x.data_ptr() % 8 == 0 for x in (a, b)):
        a, b = a.view(torch.int64), b.view(torch.int64)  # half the time
    return not torch.equal(a, b)


def any_of(answers: Iterable[bool | Tensor]) -> bool | Tensor:
    """Whether any answer is yes; a tensor if that cannot be told without waiting for an accelerator."""
    waiting: list[Tensor] = []
    for answer in answers:
        if isinstance(answer, Tensor):
            waiting.append(answer)
        elif answer:
            return True
    if not waiting:
        return False
    if len({answer.device for answer in waiting}) > 1:
        waiting = [answer.cpu() for answer in waiting]
    return torch.stack(waiting).any()


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory, read as integers."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(BITS[tensor.element_size()]) if tensor.is_floating_point() else tensor
