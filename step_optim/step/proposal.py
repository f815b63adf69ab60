"""The inner step: what its arguments are, and at which learning rates it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer


def loss_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """Return the loss closure among the arguments of a step."""
    return args[0] if args else kwargs.get("closure")


def has_gradient(optimizer: Optimizer) -> bool:
    """Whether any parameter has a gradient."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def learning_rates(optimizer: Optimizer) -> tuple[float, ...]:
    """The learning rate of each parameter group that has one."""
    return tuple(float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None)


@contextmanager
def scaled_rates(optimizer: Optimizer, factor: float, *, but: Collection[int] = ()) -> Iterator[None]:
    """Multiply every learning rate for the duration of the body, but for those of some groups, by their ids."""
    scaled = (group for group in optimizer.param_groups if id(group) not in but)
    groups = [(group, group["lr"]) for group in scaled] if factor != 1 else []
    try:
        for group, lr in groups:
            group["lr"] = lr * factor
        yield
    finally:
        for group, lr in groups:
            group["lr"] = lr
