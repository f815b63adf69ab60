"""Torch's global step hooks see a step of the wrapper as a step of one optimizer: once, before and after all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from step_optim.host.undo import undone

Hook = Callable[[Optimizer, Any, Any], Any]

_PASSED_OVER: set[int] = set()
"""Ids of the inner optimizers that a wrapper is stepping."""


class _Outside:
    """A global hook that passes over those."""

    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return None if id(optimizer) in _PASSED_OVER else self._hook(optimizer, args, kwargs)


def pre_hooks() -> list[Hook]:
    """Return the global hooks before a step."""
    return list(_global_optimizer_pre_hooks.values())


def post_hooks() -> list[Hook]:
    """Return the global hooks after a step."""
    return list(_global_optimizer_post_hooks.values())


@contextmanager
def inner_step(optimizer: Optimizer) -> Iterator[None]:
    """Let global hooks pass over what an optimizer does as a part of the wrapper's step.

    They would see a candidate that may be taken back, and every trial of a
    step that is run again. A hook stays wrapped as long as it is registered:
    to unwrap it here would race with other threads.
    """
    for hooks in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks):
        for key, hook in list(hooks.items()):
            if not isinstance(hook, _Outside):
                hooks[key] = _Outside(hook)
    with undone(lambda: _PASSED_OVER.discard(id(optimizer))):
        _PASSED_OVER.add(id(optimizer))
        yield
