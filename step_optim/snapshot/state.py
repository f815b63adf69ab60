"""Bit-exact capture and restore of everything that an optimizer's step may change besides the weights.

What it covers: everything reachable from the optimizer (``state`` of any
nesting, group values, plain attributes, generators, tensors inside tensor
subclasses), object identity and shared tensors included, and `.grad`.
What it does not: `nn.Module`s and closures that an optimizer holds, objects
with ``__slots__``, files, other processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from step_optim.snapshot.entries import Entries
from step_optim.snapshot.groups import GroupJournal
from step_optim.snapshot.store import TensorStore
from step_optim.snapshot.tensors import plain_tensors
from step_optim.snapshot.walk import Walk


class OptimizerState:
    """Everything an optimizer's step may change besides the weights: state, attributes, gradients, group values.

    Args:
        optimizer: whose state this is.
        host: keep the copies of a CUDA device's tensors in pinned host memory.
    """

    def __init__(self, optimizer: Optimizer, *, host: bool = False) -> None:
        self._optimizer = optimizer
        self._tensors, self._buffers = TensorStore(host=host), TensorStore()
        self._walk: Walk | None = None
        self._host = host
        self._gradients = Gradients(optimizer, host=host)
        self._groups = GroupJournal(optimizer)

    @torch.no_grad()
    def capture(self, buffers: Iterable[Tensor] = ()) -> None:
        """Remember all of it, and some module buffers, which a forward in a loss closure or a window may move."""
        self._buffers.capture(t for buffer in buffers for t in plain_tensors(buffer))
        self._walk = Walk(self._optimizer)
        self._tensors.capture(self._walk.tensors)
        self._gradients.capture()
        self._groups.forget()

    def saved(self, tensor: Tensor) -> Tensor | None:
        """The bits that a state tensor had, in its shape; None if it was not there."""
        return next((copy.saved for copy in self._tensors.copies if copy.tensor is tensor), None)

    def watch_groups(self) -> GroupJournal:
        """Return a context; group values that change inside it are rolled back by `restore`, others are not."""
        return self._groups

    @torch.no_grad()
    def entries(self, parameters: Sequence[Tensor]) -> Entries:
        """Take what belongs to some parameters alone, as it is now; `restore` may leave it so.

        Raises:
            CannotKeep: the step has changed something that belongs to them and others together.
        """
        assert self._walk is not None
        found = Entries(self._optimizer, parameters, host=self._host)
        found.check(self._tensors, self._walk.held, self._groups.written())
        return found

    @torch.no_grad()
    def restore(self, *, keep_state: bool = False, but: Entries | None = None) -> None:
        """Put all of it back, bit for bit; keys and attributes that were created since are removed.

        Args:
            keep_state: leave what belongs to the optimizer (moments, counters,
                group values) as the step made it; put buffers and gradients back.
            but: what is left as it was when this was taken.
        """
        if not keep_state:
            self.restore_optimizer(but)
        self._buffers.restore()
        self._gradients.restore()

    @torch.no_grad()
    def restore_optimizer(self, but: Entries | None = None) -> None:
        """Put back what belongs to the optimizer alone; for ``but`` see `restore`."""
        for undo in [] if self._walk is None else self._walk.undo:
            undo()
        self._tensors.restore()
        self._groups.revert(but=() if but is None else but.groups)
        if but is not None:
            but.put_back()

    def release(self) -> None:
        """Let the gradients go."""
        self._gradients.release()


class Gradients:
    """The gradients of an optimizer's parameters: 14 of 211 optimizer configurations write into them."""

    def __init__(self, optimizer: Optimizer, *, host: bool = False) -> None:
        self._optimizer = optimizer
        self._store = TensorStore(host=host)
        self._grad_of: list[tuple[Tensor, Tensor | None]] = []

    @torch.no_grad()
    def capture(self) -> None:
        """Remember which there are, and their bits."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._grad_of = [(p, p.grad) for p in parameters]
        self._store.capture(t for _, grad in self._grad_of if grad is not None for t in plain_tensors(grad))

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, object and bits."""
        for parameter, grad in self._grad_of:
            if parameter.grad is not grad:
                parameter.grad = grad
        self._store.restore()

    def release(self) -> None:
        """Let them go: a reference to them would keep their memory through the next backward pass."""
        self._grad_of = []
        self._store.forget()
