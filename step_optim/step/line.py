"""The points between theta_t and the candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from step_optim.host.hooks import inner_step
from step_optim.snapshot.copies import Copies
from step_optim.snapshot.weights import Weights


def loss_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """Return the loss closure among the arguments of a step."""
    return args[0] if args else kwargs.get("closure")


class Line:
    """theta_t + alpha (candidate - theta_t), with the candidate's optimizer state.

    Copies of the weights in that state move along.
    """

    scale = 1.0
    """On the learning rates of the proposals; see `radius`."""

    def __init__(self, optimizer: Optimizer, weights: Weights, copies: Copies) -> None:
        self._optimizer, self._weights, self._copies = optimizer, weights, copies

    def mark(self) -> None:
        """Begin at theta_t."""
        self._copies.mark()

    def propose(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the inner step: theta~ = OptStep(theta_t, gradient). Its arguments go to it untouched."""
        with self.proposing():
            return self._optimizer.step(*args, **kwargs)

    @contextmanager
    def proposing(self) -> Iterator[None]:
        """While the inner optimizer moves weights, its rates are scaled, and global hooks pass over it."""
        with scaled_rates(self._optimizer, self.scale), inner_step(self._optimizer):
            yield

    def keep_candidate(self) -> None:
        """Remember the candidate, which is where the weights are."""
        self._weights.keep_candidate()
        self._copies.keep_candidate()

    def go(self, alpha: float) -> None:
        """Write the point alpha."""
        self._weights.go(alpha)
        self._copies.go(alpha)

    def go_back(self) -> None:
        """Take along what follows the weights to theta_t, where the rest of the state stays the candidate's."""
        self._copies.go(0)

    def write(self, values: Sequence[Tensor]) -> None:
        """Write weights off the line."""
        self._weights.write(values)
        self._copies.follow()

    @property
    def is_lerp(self) -> bool:
        """Whether the weights at a point are theta_t + alpha (candidate - theta_t), rounded once."""
        return not self._copies.round_weights


@contextmanager
def scaled_rates(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Multiply every learning rate for the duration of the body."""
    groups = [(group, group["lr"]) for group in optimizer.param_groups] if factor != 1 else []
    try:
        for group, lr in groups:
            group["lr"] = lr * factor
        yield
    finally:
        for group, lr in groups:
            group["lr"] = lr


def check_rates(optimizer: Optimizer, option: str, instead: str) -> None:
    """Refuse to scale a learning rate that there is not.

    Raises:
        ValueError: a parameter group without one.
    """
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"{option} scales the learning rate, and {type(optimizer).__name__} has a parameter group without one; "
            f"use {instead}"
        )
