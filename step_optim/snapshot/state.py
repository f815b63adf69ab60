"""Bit-exact capture and restore of everything that an optimizer's step may change besides the weights.

What it covers: everything reachable from the optimizer (``state`` of any
nesting, group values, plain attributes, generators, tensors inside tensor
subclasses), object identity and shared tensors included, and `.grad`.
What it does not: `nn.Module`s and closures that an optimizer holds, objects
with ``__slots__``, files, other processes.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from step_optim.snapshot.generators import OwnState, carries_state
from step_optim.snapshot.groups import GroupJournal
from step_optim.snapshot.store import TensorStore
from step_optim.snapshot.tensors import plain_tensors

_PLAIN = frozenset([bool, int, float, str, type(None)])
_OPAQUE = (nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


class OptimizerState:
    """Everything an optimizer's step may change besides the weights: state, attributes, gradients, group values.

    Args:
        optimizer: whose state this is.
        host: keep the copies of a CUDA device's tensors in pinned host memory.
    """

    def __init__(self, optimizer: Optimizer, *, host: bool = False) -> None:
        self._optimizer = optimizer
        self._tensors, self._buffers = TensorStore(host=host), TensorStore()
        self._undo: list[Callable[[], Any]] = []
        self._gradients = Gradients(optimizer, host=host)
        self._groups = GroupJournal(optimizer)

    @torch.no_grad()
    def capture(self, buffers: Iterable[Tensor] = ()) -> None:
        """Remember all of it, and some module buffers, which a forward in a loss closure or a window may move."""
        self._buffers.capture(t for buffer in buffers for t in plain_tensors(buffer))
        walk = _Walk(self._optimizer)
        self._undo = walk.undo
        self._tensors.capture(walk.tensors)
        self._gradients.capture()
        self._groups.forget()

    def saved(self, tensor: Tensor) -> Tensor | None:
        """The bits that a state tensor had, in its shape; None if it was not there."""
        return next((copy.saved for copy in self._tensors.copies if copy.tensor is tensor), None)

    def watch_groups(self) -> GroupJournal:
        """Return a context; group values that change inside it are rolled back by `restore`, others are not."""
        return self._groups

    @torch.no_grad()
    def restore(self, *, keep_state: bool = False) -> None:
        """Put all of it back, bit for bit; keys and attributes that were created since are removed.

        Args:
            keep_state: leave what belongs to the optimizer (moments, counters,
                group values) as the step made it; put buffers and gradients back.
        """
        if not keep_state:
            self.restore_optimizer()
        self._buffers.restore()
        self._gradients.restore()

    @torch.no_grad()
    def restore_optimizer(self) -> None:
        """Put back what belongs to the optimizer alone."""
        for undo in self._undo:
            undo()
        self._tensors.restore()
        self._groups.revert()

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


class _Walk:
    """All tensors reachable from an optimizer but its parameters, and how to undo changes to what holds them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.tensors: list[Tensor] = []
        self.undo: list[Callable[[], Any]] = []
        # Parameters are the business of Weights; their objects are kept here so that ids stay unique.
        self._seen: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self._visit(optimizer)

    def _visit(self, item: Any) -> None:
        if (
            item is None
            or isinstance(item, (bool, int, float, complex, str, bytes, *_OPAQUE))
            or id(item) in self._seen
        ):
            return
        self._seen[id(item)] = item
        if isinstance(item, Tensor):
            self.tensors += plain_tensors(item)
        elif isinstance(item, (dict, list, deque, set)):
            self._container(item)
        elif isinstance(item, (tuple, frozenset)):
            self._visit_all(item)
        elif isinstance(item, Optimizer):
            self._optimizer(item)
        elif carries_state(item):
            self.undo.append(OwnState(item).put_back)
        elif has_own_state(item):
            self._visit(vars(item))

    def _visit_all(self, items: Iterable[Any]) -> None:
        seen, tensors = self._seen, self.tensors
        for item in items:
            if type(item) is Tensor and item.layout is torch.strided:  # most of all items, in the fewest steps
                if id(item) not in seen:
                    seen[id(item)] = item
                    tensors.append(item)
            elif type(item) not in _PLAIN:
                self._visit(item)

    def _container(self, item: Any) -> None:
        members = dict(item) if isinstance(item, dict) else list(item)
        self._visit_all(members.values() if isinstance(members, dict) else members)
        self.undo.append(lambda: refill(item, members))

    def _optimizer(self, item: Optimizer) -> None:
        """Attributes of an optimizer, but for its group list: scalars in there belong to GroupJournal."""
        for group in item.param_groups:
            self._visit_all(v for k, v in group.items() if k != "params" and not isinstance(v, Tensor))
        attributes = dict(vars(item))
        self._visit_all(value for name, value in attributes.items() if name != "param_groups")

        def undo() -> None:
            # A scheduler's note that step() was called stays: it warns about the order of calls.
            called = {name: value for name, value in vars(item).items() if name == "_opt_called"}
            refill(vars(item), attributes | called)

        self.undo.append(undo)


def refill(container: Any, members: Any) -> None:
    """Give a container its old members again, in place. An interrupt half-way leaves it usable for a second try."""
    if isinstance(container, list):
        container[:] = members
    elif isinstance(container, dict):
        for key in [key for key in container if key not in members]:
            del container[key]
        container.update(members)
        if list(container) != list(members):  # what was away is at the end now
            for key in members:
                container[key] = container.pop(key)
    elif isinstance(container, set):
        # Only what differs: a set that was emptied and refilled would iterate in another order.
        container.difference_update(container.difference(members))
        container.update(members)
    else:
        container.clear()
        container.extend(members)


def has_own_state(item: Any) -> bool:
    """Whether to look into an object: not into those of the standard library (loggers, locks, files)."""
    return hasattr(item, "__dict__") and type(item).__module__.split(".")[0] not in sys.stdlib_module_names
