"""The points between theta_t and the candidate, and two ways to reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from step_optim.host.hooks import inner_step
from step_optim.host.rng import RNGState
from step_optim.snapshot.copies import Copies
from step_optim.snapshot.state import Gradients, OptimizerState
from step_optim.snapshot.weights import Weights

SHRINKS = ("interpolate", "restep")


def loss_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """Return the loss closure among the arguments of a step."""
    return args[0] if args else kwargs.get("closure")


class Line:
    """``shrink="interpolate"``: theta_t + alpha (candidate - theta_t), with the candidate's optimizer state.

    Copies of the weights in that state move along.
    """

    restarts = False
    """Whether a point is reached by running the inner step again."""
    scale = 1.0
    """On the learning rates of the proposals; see `radius`."""

    def __init__(self, optimizer: Optimizer, weights: Weights, state: OptimizerState, copies: Copies) -> None:
        self._optimizer, self._weights, self._state, self._copies = optimizer, weights, state, copies

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
        return not self.restarts and not self._copies.round_weights

    def release(self) -> None:
        """The step is over."""


class Restep(Line):
    """``shrink="restep"``: the inner step again from theta_t, at alpha times the learning rate.

    For optimizers whose weights and state cannot be told apart: what is
    committed is a step that they could have made themselves.
    """

    restarts = True

    def __init__(self, optimizer: Optimizer, weights: Weights, state: OptimizerState, copies: Copies) -> None:
        super().__init__(optimizer, weights, state, copies)
        self._gradients = Gradients(optimizer)

    def mark(self) -> None:
        """Begin at theta_t."""
        super().mark()
        self._again: Callable[[], Any] | None = None
        self._before_step()

    def _before_step(self) -> None:
        """Keep what the inner step starts from besides theta_t and the state; a loss closure changes both."""
        self._gradients.capture()  # the step may write into them
        self._rng = RNGState.capture()

    def write(self, values: Sequence[Tensor]) -> None:
        """Refuse: the state that belongs to other weights is not known.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("shrink='restep' reaches points on the line only; accept trial.at(alpha), or interpolate")

    def release(self) -> None:
        """Let the gradients go."""
        self._gradients.release()

    def propose(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the inner step, and remember how to run it again without evaluating the loss again.

        Raises:
            RuntimeError: the inner optimizer evaluates the loss more than once.
        """
        closure = loss_closure(args, kwargs)
        if closure is None:
            self._again = lambda: super(Restep, self).propose(args, kwargs)
            return self._again()
        losses: list[Any] = []

        def evaluated() -> Any:
            if losses:
                raise RuntimeError(
                    f"shrink='restep': {type(self._optimizer).__name__} evaluates the loss more than once in a step, "
                    "and the weights that it evaluates at depend on the learning rate; use shrink='interpolate'"
                )
            losses.append(closure())
            self._before_step()
            return losses[0]

        def step(loss: Callable[[], Any]) -> Any:
            if args:
                return super(Restep, self).propose((loss, *args[1:]), kwargs)
            return super(Restep, self).propose(args, kwargs | {"closure": loss})

        self._again = lambda: step(lambda: losses[0])
        return step(evaluated)

    def go(self, alpha: float) -> None:
        """Write the point alpha, and the state that belongs to it."""
        self._weights.restore()
        self._state.restore_optimizer()
        self._gradients.restore()
        self._rng.restore()
        if alpha == 0:
            return
        assert self._again is not None
        # An interrupt in here is undone with what the step writes.
        with self._state.watch_groups(), scaled_rates(self._optimizer, alpha):
            self._again()


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


def check_shrink(shrink: str, optimizer: Optimizer) -> None:
    """Refuse a way to shrink that this optimizer cannot go.

    Raises:
        ValueError: an unknown name; a parameter group without a learning rate.
    """
    if shrink not in SHRINKS:
        raise ValueError(f"shrink={shrink!r} is unknown; use one of {SHRINKS}")
    if shrink == "restep":
        check_rates(optimizer, "shrink='restep'", "shrink='interpolate'")


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
