"""Whether weights that an audit reads were written by somebody else since the last commit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from step_optim.snapshot.tensors import any_of, as_bits, differs, place, plain_tensors

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
        self._plain, self._sums, self._buffers = plain, sums, buffers

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
        if not isinstance(other, Fingerprint) or self._plain != other._plain or len(self._sums) != len(other._sums):
            return True
        return any_of(
            a.shape != b.shape or a.device != b.device or differs(a, b)
            for a, b in zip(self._sums, other._sums, strict=True)
        )

    def __eq__(self, other: object) -> bool:
        return not bool(self.differs(other))

    __hash__ = None  # type: ignore[assignment]


class Fingerprints:
    """Takes fingerprints of modules. Views of what is read are kept as long as the tensors stay where they are.

    An ordinary write counts up a tensor's version. One through `.data`, and
    the kernels of some optimizers, do not, so bits are read besides: all of a
    trained or a small tensor, `SAMPLE` evenly spread elements of a frozen one.
    What stays unseen is an edit of a *part* of a *frozen* tensor through
    `.data`, and what is no tensor and no module (a scaling factor).
    """

    def __init__(self) -> None:
        self._views: dict[int, tuple[Any, Tensor]] = {}

    def of(self, modules: Iterable[nn.Module], own: Collection[int] = ()) -> Fingerprint:
        """Identity, place, version, requires_grad and bits of every parameter and buffer of some modules; children.

        Args:
            modules: those whose own parameters and buffers count (not their children's).
            own: ids of the parameters whose bits the caller compares itself.
        """
        modules, kept = list(modules), self._views
        children = [id(child) for module in modules for child in module._modules.values()]
        self._views = {}
        buffers = self._of((buffer for module in modules for buffer in module._buffers.values()), own, kept)
        weights = self._of((weight for module in modules for weight in module._parameters.values()), own, kept)
        return Fingerprint((children, weights._plain), weights._sums, buffers)

    def _of(self, parts: Iterable[Tensor | None], own: Collection[int], kept: dict[int, Any]) -> Fingerprint:
        tensors = list(_tensors(parts))
        marks = [
            (id(tensor), tensor.data_ptr(), tensor._version, needs_grad)
            for tensor, needs_grad, _ in tensors
            if not tensor.is_inference()
        ]
        sums: dict[torch.device, list[Tensor]] = {}
        samples: dict[Any, list[Tensor]] = {}
        for tensor, needs_grad, identity in tensors:
            if identity in own or tensor.numel() == 0 or tensor.device.type == "meta":
                continue
            if needs_grad and tensor.numel() > SAMPLE:
                sums.setdefault(tensor.device, []).append(as_bits(tensor).sum(dtype=torch.int64))
            else:
                view = self._view(tensor, kept)
                samples.setdefault((view.device, view.dtype), []).append(view)
        # One operation for all samples of a kind, where there may be hundreds of tensors.
        found = [torch.stack(parts) for parts in sums.values()] + [torch.cat(parts) for parts in samples.values()]
        return Fingerprint(marks, found)

    def _view(self, tensor: Tensor, kept: dict[int, Any]) -> Tensor:
        """The bits of a tensor that are looked at, flat; always in the memory that it has now."""
        where, known = place(tensor), kept.get(id(tensor))
        if known is None or known[0] != where:
            known = (where, as_bits(_sample(tensor)).reshape(-1))
        if known[1]._base is not None:  # a view, and no copy of what cannot be viewed
            self._views[id(tensor)] = known
        return known[1]


def _tensors(parts: Iterable[Tensor | None]) -> Iterator[tuple[Tensor, bool, int]]:
    """The tensors that hold the data; whether what they belong to is trained; its id."""
    for tensor in parts:
        if tensor is not None:
            for plain in plain_tensors(tensor):
                yield plain, tensor.requires_grad, id(tensor)


def _sample(tensor: Tensor) -> Tensor:
    """`SAMPLE` evenly spread elements, flat; all if there are no more."""
    flat = tensor.detach()
    flat = flat.view(-1) if flat.is_contiguous() else flat.reshape(-1)
    return flat[:: max(1, tensor.numel() // SAMPLE)][:SAMPLE]
