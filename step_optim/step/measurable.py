"""Whether a KL closure can tell what a budget asks: refusals, and warnings of figures that say little."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

from step_optim.audit.closure import KLClosure
from step_optim.budget import Budget
from step_optim.limits import Limits

FEW = 5
"""Prompts of a slice below which its figure is told to say little about others: with the spread of real steps (0.55 of
the mean) five prompts leave a standard error of a quarter."""


def check_budget(budget: Budget, kl: KLClosure) -> None:
    """Refuse a budget for what a KL closure does not measure."""
    budget.check_slices(kl.slices)
    if budget.caps_drift and not kl.measures_drift:
        raise ValueError(f"budget.drift needs a KL closure that measures drift (TokenKL, PolicyKL), not {kl!r}")
    if budget.token not in (None, math.inf) and not getattr(kl, "has_tokens", True):
        raise ValueError(
            f"budget.token={budget.token!r} limits the worst token, and {kl!r} measures observations; use "
            "Budget(prompt=...) for the worst of these, or PolicyKL(..., reduction='mean') for policies over tokens"
        )
    if budget.confidence is not None:
        for name, count in _limited(budget, kl):
            if count < 2:
                raise ValueError(
                    f"budget.confidence={budget.confidence} needs the spread over prompts, and {name} has one; give it "
                    "at least two (eight or more make a useful bound), or leave it out of the budget"
                )


def few_prompts(budget: Budget, kl: KLClosure) -> list[str]:
    """Describe the limited slices that have few prompts."""
    return [f"{name} has {count}" for name, count in _limited(budget, kl) if count < FEW and name != "the control set"]


def _limited(budget: Budget, kl: KLClosure) -> Iterator[tuple[str, int]]:
    """Yield what the budget limits, and how many prompts it has; nothing if that is not known in this process."""
    counts = None if kl.sharded else kl.counts
    if counts is None:
        return
    if any(bound is not None for bound in (budget.mean, budget.drift, budget.path)):
        yield "the control set", counts["mean"]
    for name in budget.limited_slices(kl.slices or ()):
        yield f"slice {name!r}", counts[name]


def below_noise(limits: Limits, kl: KLClosure) -> bool:
    """Warn of budgets that rounding alone would exceed; whether there are any. What a path has left may end there."""
    floor = kl.noise_floor
    asked = {name.removeprefix("slice:"): limit for name, limit in limits.as_set.items()}
    asked |= {"worst prompt": limits.prompt, "worst token": limits.token}
    found = [] if floor is None else floor.above(asked)
    if found and floor is not None:
        wider = f", or {kl.noise_remedy}" if kl.noise_remedy else ""
        warnings.warn(
            f"the audit's rounding in {floor.name} reads more than the budget allows ({'; '.join(found)} nats per "
            f"token): steps would be shrunk or rejected for noise. Raise the budget{wider}",
            stacklevel=2,
        )
    return bool(found)
