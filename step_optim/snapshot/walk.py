"""The way through everything that is reachable from an optimizer."""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from step_optim.snapshot.generators import OwnState, carries_state
from step_optim.snapshot.tensors import plain_tensors

_PLAIN = frozenset([bool, int, float, str, type(None)])
_OPAQUE = (nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


class Walk:
    """All tensors reachable from an optimizer but its parameters, and how to undo changes to what holds them.

    Args:
        optimizer: whose parameters are left out.
        root: where to begin; by default the optimizer itself.
    """

    def __init__(self, optimizer: Optimizer, root: Any = None) -> None:
        self.tensors: list[Tensor] = []
        self.undo: list[Callable[[], Any]] = []
        # Parameters are the business of Weights; their objects are kept here so that ids stay unique.
        self._seen: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self._visit(optimizer if root is None else root)

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
        self.undo.append(partial(refill, item, members))

    def _optimizer(self, item: Optimizer) -> None:
        """Attributes of an optimizer, but for its group list: scalars in there belong to GroupJournal."""
        for group in item.param_groups:
            self._visit_all(v for k, v in group.items() if k != "params" and not isinstance(v, Tensor))
        attributes = dict(vars(item))
        self._visit_all(value for name, value in attributes.items() if name != "param_groups")
        self.undo.append(partial(_refill_attributes, vars(item), attributes))

    @property
    def held(self) -> dict[int, tuple[Any, Any]]:
        """The containers that were met, the attributes of objects among them, and their members; by id."""
        pairs = (undo.args for undo in self.undo if isinstance(undo, partial))
        return {id(container): (container, members) for container, members in pairs}


def _refill_attributes(container: dict[str, Any], members: dict[str, Any]) -> None:
    # A scheduler's note that step() was called stays: it warns about the order of calls.
    called = {name: value for name, value in container.items() if name == "_opt_called"}
    refill(container, members | called)


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
