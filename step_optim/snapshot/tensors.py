"""Tensors as memory: where their elements are, which bits they have, and a copy of one that can be put back."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

BLOCK = 2**16
"""Elements that `digest` reads at once: in a CPU's cache their products are next to free."""

MULTIPLIER = 0x9E3779B97F4A7C15
"""Odd, and without a pattern in its bits."""

SYNCHRONOUS = ("cpu", "meta")
"""Devices whose results can be looked at without waiting for anything."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: NaN equals itself, -0.0 does not equal 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.device.type == "meta":  # no bits at all: an inner step has to say itself that it cannot work on these
        return True
    return torch.equal(as_bits(a), as_bits(b))


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory, read as integers; a complex tensor with one more dimension."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(BITS[tensor.element_size()]) if tensor.is_floating_point() else tensor


def place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's elements are in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


_STORAGE, _OFFSET = methodcaller("untyped_storage"), methodcaller("storage_offset")
_POINTER, _STRIDE = methodcaller("data_ptr"), methodcaller("stride")
_IS_CONJ, _IS_NEG = methodcaller("is_conj"), methodcaller("is_neg")
_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")


def places(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """`place` of many tensors, without a line of python for each: pointers, shapes, strides, dtypes."""
    return tuple(list(map(of, tensors)) for of in (_POINTER, _SHAPE, _STRIDE, _DTYPE))


def signs(tensors: Sequence[Tensor]) -> tuple[list[bool], ...]:
    """Which tensors are conjugate and which are negative views: they are other numbers than their memory holds."""
    return list(map(_IS_CONJ, tensors)), list(map(_IS_NEG, tensors))


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor was written; -1 of one that was made in inference mode, which does not count."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


class Memory:
    """The memory that a tensor has now. Noting it is no operation, but of a conjugate or negative view."""

    __slots__ = ("_alias", "_offset", "_place", "_storage")

    def __init__(self, storage: Any, offset: int, place: tuple[Any, ...], alias: Tensor | None) -> None:
        self._storage, self._offset, self._place, self._alias = storage, offset, place, alias

    @classmethod
    def of(cls, tensor: Tensor) -> Memory:
        """Note that of one tensor."""
        return cls.of_all([tensor])[0]

    @classmethod
    def of_all(cls, tensors: Sequence[Tensor]) -> list[Memory]:
        """Note that of many tensors, without a line of python for each."""
        aliases = [
            t.detach() if conjugate or negative else None
            for t, conjugate, negative in zip(tensors, *signs(tensors), strict=True)
        ]
        where = zip(*places(tensors), strict=True)
        return list(map(cls, map(_STORAGE, tensors), map(_OFFSET, tensors), where, aliases))

    def hold(self, tensor: Tensor) -> None:
        """Keep the memory from being freed, for a tensor that has it."""
        self._storage = tensor.untyped_storage()

    def let_go(self) -> None:
        """Let it be freed; until `hold`, only its place is known."""
        self._storage = self._alias = None

    @property
    def place(self) -> tuple[Any, ...]:
        """Of its elements; see `place`."""
        return self._place

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = self._storage.device
        return device

    @property
    def address(self) -> int:
        """Where it begins."""
        return int(self._storage.data_ptr())

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor has this memory; `place`, in the fewest steps: it is asked of every tensor in every step."""
        pointer, shape, stride, dtype = self._place
        return bool(
            tensor.data_ptr() == pointer
            and tensor.stride() == stride
            and tensor.shape == shape
            and tensor.dtype is dtype
        )

    def tensor(self) -> Tensor:
        """Return a tensor that has it."""
        if self._alias is not None:
            return self._alias
        _, shape, stride, dtype = self._place
        empty = torch.empty(0, dtype=dtype, device=self._storage.device)
        return empty.set_(self._storage, self._offset, shape, stride)


class Located:
    """A tensor, and the memory that it has now: an optimizer may put its `.data` somewhere else."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.memory = tensor, Memory.of(tensor)

    @property
    def in_place(self) -> bool:
        """Whether the tensor still lives there."""
        return self.memory.is_of(self.tensor)

    def put_back(self) -> None:
        """Let it live there again."""
        if not self.in_place:
            self.tensor.data = self.memory.tensor()


class TensorCopy(Located):
    """The bits of one tensor, and the memory that they have to go back to. Used without gradients.

    Args:
        tensor: what is copied.
        bits: where to; a tensor of its own by default.
    """

    def __init__(self, tensor: Tensor, bits: Tensor | None = None) -> None:
        super().__init__(tensor)
        self.bits = torch.empty_like(self.dense) if bits is None else bits

    def aim(self, tensor: Tensor, memory: Memory) -> None:
        """Copy another tensor of the same shape, strides, dtype and device from now on."""
        self.tensor, self.memory = tensor, memory

    def let_go(self) -> None:
        """Let the tensor go; until `aim`, only the bits are there."""
        self.tensor = self.bits
        self.memory.let_go()

    @property
    def dense(self) -> Tensor:
        """The memory that the tensor had; all of it, if its elements overlap."""
        return dense(self.tensor if self.in_place else self.memory.tensor())

    @property
    def saved(self) -> Tensor:
        """The saved bits, in the tensor's shape and on its device."""
        bits, (_, shape, stride, _) = self.bits.to(self.memory.device), self.memory.place
        return bits if bits.shape == shape else bits.as_strided(shape, stride)

    @property
    def unchanged(self) -> bool:
        """Whether the tensor has the saved bits, in the memory that it had."""
        return self.in_place and same_bits(self.dense, self.bits.to(self.memory.device))

    def restore(self) -> None:
        """Put the bits back; the tensor object and its memory are those of the capture."""
        self.put_back()
        there, bits = self.dense, self.bits.to(self.memory.device)
        if not same_bits(there, bits):  # an unneeded write would look like an outside edit
            there.copy_(bits)


def is_plain_memory(tensor: Tensor) -> bool:
    """Whether a tensor is strided memory of its own: no DTensor, no other wrapper, not made in inference mode."""
    return (
        not hasattr(tensor, "__tensor_flatten__")
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_inference()
    )


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


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; all of any other tensor."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def shard_count(parameter: Tensor) -> int:
    """Into how many pieces a parameter is split over processes: 1 unless it is a sharded DTensor."""
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return 1
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    return math.prod(mesh.size(dim) for dim, placement in enumerate(placements) if placement.is_shard())


def is_synchronous(tensor: Tensor) -> bool:
    """Whether its device can be looked at without waiting."""
    return tensor.device.type in SYNCHRONOUS


def differs(a: Tensor, b: Tensor) -> bool | Tensor:
    """Whether two tensors of one shape and dtype differ in any bit; an accelerator answers with a tensor, later."""
    if a.device.type == "meta" or a.numel() == 0:
        return False
    a, b = as_bits(a), as_bits(b)
    if not is_synchronous(a):
        return (a != b).any()
    if all(x.is_contiguous() and x.nbytes % 8 == 0 and x.data_ptr() % 8 == 0 for x in (a, b)):
        a, b = _words(a), _words(b)  # half the time
    return not torch.equal(a, b)


def _words(bits: Tensor) -> Tensor:
    """The memory of a contiguous tensor, flat, eight bytes at a time: its rows may have any length."""
    return bits.as_strided((bits.numel(),), (1,)).view(torch.int64)


def digest(tensors: Iterable[Tensor]) -> int:
    """A number that two lists of tensors of the same shapes share if, but for a chance of 2^-63, all bits agree.

    The elements' bits, times odd random numbers that depend on the place,
    summed up modulo 2^64; so are the sums of the parts.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.device.type == "meta" or tensor.numel() == 0:
            continue
        for part in as_bits(tensor).reshape(-1).split(BLOCK):  # type: ignore[no-untyped-call]
            sums.setdefault(part.device, []).append((part.to(torch.int64) * _factors(part.device)[: len(part)]).sum())
    words = [word for parts in sums.values() for word in torch.stack(parts).tolist()]
    return functools.reduce(lambda total, word: (total * MULTIPLIER + word) % 2**64, words, 0)


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """`BLOCK` odd random numbers, always the same ones, [BLOCK] int64."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (BLOCK,), generator=generator, device="cpu") * 2 + 1).to(device)


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
