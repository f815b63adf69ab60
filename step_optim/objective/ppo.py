"""What PPO itself does about KL, on the objective's side: an adaptive penalty, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOAT32 = torch.finfo(torch.float32)
"""Losses are computed in it: a coefficient stays in its range, and so can always come back."""


@dataclass
class AdaptiveKL:
    """The weight of a KL penalty, which follows the KL that was measured.

    Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593, section 2.2)::

        e = clip((KL - target) / target, -0.2, 0.2),    beta <- beta (1 + 0.1 e)

    Raises:
        ValueError: an argument out of range.

    >>> penalty = AdaptiveKL(coefficient=0.1, target=0.05)
    >>> round(penalty.update(0.2), 6), round(penalty.update(0.045), 6)
    (0.102, 0.10098)
    """

    coefficient: float
    """beta: the loss has ``coefficient * kl`` in it."""

    target: float
    """KL from the reference to aim at, in the unit of what `update` is given [nats per token, say; the paper sums over
    a response]."""

    rate: float = 0.1
    """K_beta; 0 leaves the coefficient as it is."""

    clip: float = 0.2
    """The largest relative error that one update answers to."""

    skips: int = field(default=0, init=False)
    """Updates whose KL was no number."""

    def __post_init__(self) -> None:
        """Check the arguments."""
        self.coefficient = _coefficient(self.coefficient, "coefficient")
        if not 0 < self.target < math.inf:
            raise ValueError(f"target={self.target} must be a finite KL > 0, in nats per token say")
        if not (self.rate >= 0 and 0 < self.clip < math.inf and self.rate * self.clip < 1):
            raise ValueError(
                f"rate={self.rate} and clip={self.clip} must be at least 0 with a product below 1 (0.1 and 0.2): one "
                "update multiplies the coefficient by no less than 1 - rate * clip"
            )

    def update(self, kl_nats: float | Tensor) -> float:
        """Follow one measurement; return the new coefficient.

        An infinite KL counts as any other above the target. A sampled KL may be
        negative, and counts as below it. NaN and -inf say nothing: the
        coefficient stays, and `skips` counts them.
        """
        kl = float(kl_nats)
        if math.isnan(kl) or kl == -math.inf:
            self.skips += 1
            return self.coefficient
        error = min(max((kl - self.target) / self.target, -self.clip), self.clip)
        self.coefficient = min(max(self.coefficient * (1 + self.rate * error), FLOAT32.tiny), FLOAT32.max)
        return self.coefficient

    def state_dict(self) -> dict[str, Any]:
        """The coefficient, and the count of skipped measurements."""
        return {"coefficient": self.coefficient, "skips": self.skips}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: a missing or damaged entry; nothing was changed.
        """
        skips = read_count(state, "skips")
        self.coefficient, self.skips = _coefficient(state.get("coefficient"), "state['coefficient']"), skips


@dataclass
class TargetKL:
    """PPO's early stopping: no further minibatch of this update once the policy has moved too far.

    In the loop over an update's minibatches::

        if target_kl.exceeded(sampled_kl(new_logprobs - old_logprobs, mask)):
            break

    Spinning Up and Stable-Baselines3 ask before each step, with this factor;
    CleanRL after each epoch, with ``factor=1``.

    Raises:
        ValueError: an argument out of range.

    >>> stopping = TargetKL(0.02)
    >>> stopping.exceeded(0.029), stopping.exceeded(0.031), stopping.stops
    (False, True, 1)
    """

    target: float
    """KL from the policy that sampled the batch [nats per token]; ``math.inf`` stops at NaN alone."""

    factor: float = 1.5
    """How many times the target is too much."""

    stops: int = field(default=0, init=False)
    """How often it was too much."""

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not self.target > 0:
            raise ValueError(f"target={self.target} must be a KL > 0 in nats per token (math.inf turns it off)")
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor={self.factor} must be a finite number > 0 (1.5, or 1 to stop at the target)")

    def exceeded(self, kl_nats: float | Tensor) -> bool:
        """Whether to stop: KL > factor * target, or NaN. Counts up `stops`."""
        stop = not float(kl_nats) <= self.factor * self.target
        self.stops += stop
        return stop

    def state_dict(self) -> dict[str, Any]:
        """The count of stops."""
        return {"stops": self.stops}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: a missing or damaged entry.
        """
        self.stops = read_count(state, "stops")


@torch.no_grad()
def sampled_kl(log_ratio: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(old ‖ new) from the tokens that the old policy sampled: the mean of (r - 1) - log r.

    An unbiased estimate that is never negative, k3 in
    http://joschu.net/blog/kl-approx.html; a measurement, without a graph.

    Args:
        log_ratio: log r = new - old log-probability of each sampled token, of
            any shape, [B, T] say.
        mask: of the same shape; true, or not 0, where a token counts. What is
            elsewhere may be anything, NaN too.

    Returns:
        [] in float32 at least, nats per token: the mean over all tokens that count.

    Raises:
        ValueError: a mask of another shape; no token that counts.

    >>> sampled_kl(torch.tensor([0.0, 0.5, 9.0]), torch.tensor([1, 1, 0]))
    tensor(0.0744)
    """
    if mask is not None and mask.shape != log_ratio.shape:
        raise ValueError(
            f"mask has the shape {tuple(mask.shape)}, log_ratio {tuple(log_ratio.shape)}; give one for each"
        )
    live = log_ratio.flatten() if mask is None else log_ratio[mask.bool()]
    if live.numel() == 0:
        raise ValueError("mask leaves no token of log_ratio: there is nothing to measure; skip this minibatch")
    live = live.to(torch.promote_types(live.dtype, torch.float32))
    return (torch.expm1(live) - live).mean()


def read_count(state: Mapping[str, Any], name: str) -> int:
    """One counter of a checkpoint.

    Raises:
        ValueError: it is missing, or no count.
    """
    count = state.get(name)
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"state[{name!r}]={count!r} is no count; load what state_dict() returned")
    return count


def _coefficient(value: Any, name: str) -> float:
    if not isinstance(value, Real) or not FLOAT32.tiny <= float(value) <= FLOAT32.max:
        raise ValueError(
            f"{name}={value} must be a number > 0 in the range of float32 (0.1, say): updates multiply it, and 0 would "
            "stay 0"
        )
    return float(value)
