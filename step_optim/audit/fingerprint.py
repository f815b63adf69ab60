"""Whether weights that an audit reads were written by somebody else since the last commit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from step_optim.isolation.held import Membership
from step_optim.snapshot.tensors import any_of, as_bits, differs, places, plain_tensors, signs, versions

T = TypeVar("T")

SAMPLE = 256
"""Elements read of a frozen tensor: an edit of the whole tensor changes them. To read all would be a pass over the
model at every step (134M weights on one CPU thread: 0.9 s against 8 ms)."""


class Fingerprint:
    """What identifies the policy of some modules.

    Args:
        plain: identities, places, versions.
        sums: sums of bits, [n] int64 for each device, and bits, for each device and dtype.
        buffers: the same of the buffers, apart from the weights.
    """

    def __init__(self, plain: Any, sums: Sequence[Tensor], buffers: Fingerprint | None = None) -> None:
        self.plain, self.sums, self._buffers = plain, sums, buffers

    def differs(self, other: Any) -> bool | Tensor:
        """Whether another one is of another policy; a tensor if only an accelerator can tell."""
        if not isinstance(other, Fingerprint) or (self._buffers is None) != (other._buffers is None):
            return True
        return any_of(
            [
                self.weights_differ(other),
                self._buffers is not None and self._buffers.weights_differ(other._buffers),
            ]
        )

    def weights_differ(self, other: Any) -> bool | Tensor:
        """Whether another one is of other weights, whatever became of the buffers."""
        if not isinstance(other, Fingerprint) or self.plain != other.plain or len(self.sums) != len(other.sums):
            return True
        return any_of(
            a.shape != b.shape or a.device != b.device or differs(a, b)
            for a, b in zip(self.sums, other.sums, strict=True)
        )

    def __eq__(self, other: object) -> bool:
        return not bool(self.differs(other))

    __hash__ = None  # type: ignore[assignment]


class Fingerprints:
    """Takes fingerprints of modules, and keeps the list of what is read as long as they hold the same tensors.

    An ordinary write counts up a tensor's version. One through `.data`, and
    the kernels of some optimizers, do not, so bits are read besides: all of a
    trained or a small tensor, `SAMPLE` evenly spread elements of a frozen one.
    What stays unseen is an edit of a *part* of a *frozen* tensor through
    `.data`, and what is no tensor and no module (a scaling factor).
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._held: Membership | None = None
        self._children: list[int] = []
        self._parts: tuple[_Part, ...] = ()

    def of(self, modules: Iterable[nn.Module], own: Collection[int] = ()) -> Fingerprint:
        """Identity, place, version, requires_grad and bits of every parameter and buffer of some modules; children.

        Args:
            modules: those whose own parameters and buffers count (not their children's).
            own: ids of the parameters whose bits the caller compares itself.
        """
        modules = list(modules)
        if self._held is None or modules != self._modules or not self._held.same:
            self._list(modules)
        weights, buffers = (part.read(own) for part in self._parts)
        if self._held is None:
            self.release()
        return Fingerprint((self._children, weights.plain), weights.sums, buffers)

    def release(self) -> None:
        """Let go of the views of what was read; they would keep its memory."""
        for part in self._parts:
            part.release()

    def _list(self, modules: list[nn.Module]) -> None:
        held = [(part, dict(part.items())) for m in modules for part in (m._parameters, m._buffers, m._modules)]
        can_change = [(part, saved) for part, saved in held if isinstance(part, dict)]
        self._held = None  # until all of it is known
        self._modules, self._children = modules, [id(child) for module in modules for child in module._modules.values()]
        self._parts = tuple(
            _Part([t for module in modules for t in getattr(module, name).values() if t is not None])
            for name in ("_parameters", "_buffers")
        )
        if len(can_change) == len(held):  # TorchScript's are listed anew every time
            self._held = Membership(can_change)


class _Part:
    """The parameters, or the buffers, of some modules."""

    def __init__(self, held: list[Tensor]) -> None:
        self._held = held
        self._wrapped = any(
            hasattr(t, "__tensor_flatten__") or t.layout is not torch.strided or t.is_inference() for t in held
        )
        self._list()

    def _list(self) -> None:
        both = list(_tensors(self._held))
        self._tensors, self._owners = [tensor for tensor, _ in both], [owner for _, owner in both]
        self.release()

    def release(self) -> None:
        """Let go of the views."""
        self._planned: Any = None
        self._plan: _Plan | None = None

    @torch.no_grad()
    def read(self, own: Collection[int]) -> Fingerprint:
        """Take the fingerprint."""
        if self._wrapped:  # what is inside may be others by now
            self._list()
        tensors, owners = self._tensors, self._owners
        where = places(tensors), signs(tensors), [owner.requires_grad for owner in owners]
        if self._plan is None or self._planned != (where, own):
            self._planned, self._plan = (where, own), _Plan(tensors, owners, own)
        written = versions(tensors)
        marks = [list(map(id, owners)), where, written, versions(owners) if self._wrapped else written]
        return Fingerprint(marks, self._plan.read())


class _Plan:
    """What is read of some tensors: all bits of the trained ones, samples of the frozen ones; but of meta tensors."""

    def __init__(self, tensors: Sequence[Tensor], owners: Sequence[Tensor], own: Collection[int]) -> None:
        read = [
            (tensor, owner.requires_grad and tensor.numel() > SAMPLE)
            for tensor, owner in zip(tensors, owners, strict=True)
            if id(owner) not in own and tensor.numel() > 0 and not tensor.is_meta
        ]
        self._whole = _by_kind((tensor.device, tensor) for tensor, whole in read if whole)
        self._samples = _by_kind(
            ((tensor.device, tensor.dtype), _Sample(tensor)) for tensor, whole in read if not whole
        )

    def read(self) -> list[Tensor]:
        """Sums of bits, and bits: one operation for all samples of a kind, where there may be hundreds of tensors."""
        sums = [torch.stack([as_bits(t).sum(dtype=torch.int64) for t in kind]) for kind in self._whole]
        return sums + [as_bits(torch.cat([sample.read() for sample in kind])) for kind in self._samples]


def _by_kind(members: Iterable[tuple[Any, T]]) -> list[list[T]]:
    """Put members of one kind together."""
    kinds: dict[Any, list[T]] = {}
    for kind, member in members:
        kinds.setdefault(kind, []).append(member)
    return list(kinds.values())


class _Sample:
    """`SAMPLE` evenly spread elements of one tensor, flat; all if there are no more."""

    __slots__ = ("_size", "_step", "_tensor", "_view")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._step = tensor, max(1, tensor.numel() // SAMPLE)
        self._size = min(SAMPLE, -(-tensor.numel() // self._step))
        plain = tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
        self._view = tensor.as_strided((self._size,), (self._step,), tensor.storage_offset()) if plain else None

    def read(self) -> Tensor:
        """Return them: a view, or else a copy."""
        if self._view is not None:
            return self._view
        return self._tensor.reshape(-1)[:: self._step][:SAMPLE].resolve_conj().resolve_neg()


def _tensors(held: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors that hold the data, each with the one that it belongs to."""
    for tensor in held:
        for plain in plain_tensors(tensor):
            yield plain, tensor
