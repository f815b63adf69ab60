"""Warm start: propose at the learning rate that the last proposals have shown to be within the budget."""

from __future__ import annotations

import math
from collections.abc import Iterable

from step_optim.controllers.base import Action
from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.telemetry.record import StepRecord

AIM = 0.8
"""Part of the budget that proposals aim at: at 1, every second one would be over it."""

CHANGE = 2.0
"""The scale is at most halved or doubled from one step to the next."""


LEAST = 1 / 16
"""Caps alone, on the drift or on the path, do not bring the scale below this: a policy that sits on its cap has to go
on being pushed."""


def next_scale(scale: float, record: StepRecord) -> float:
    """Return the scale of the learning rates for the next proposal, in (0, 1].

    K grows like the square of the learning rate, so a proposal that used the
    part rho of its budget (the largest KL / budget) would have used `AIM` of it
    at sqrt(AIM / rho) times its rate. Of a cap on the drift it may use `AIM` of
    the room that theta_t had, with sqrt(drift) growing from what it was like the
    rate. It is the radius of a trust region, which grows and shrinks with what
    the last step has shown.

    Args:
        scale: that of this step.
        record: what it showed.

    >>> def after(kl):
    ...     return StepRecord(0, Action.SHRINK, Movement(kl), Movement(0.0), Limits(mean=0.04))
    >>> next_scale(1.0, after(0.0576)), next_scale(0.5, after(0.02)), next_scale(1.0, after(0.02))
    (0.7453559924999299, 0.6324555320336759, 1.0)
    """
    limits = record.budget
    if record.action is Action.UNCHANGED or not limits.limits_anything:
        return scale
    if not record.candidate.is_finite:
        return scale / CHANGE
    by_step, before = limits.without_caps(), record.previous_drift
    knows_room = limits.caps_drift and before is not None and record.candidate_drift is not None
    if not (by_step.limits_anything or knows_room):
        return scale
    ratios = by_step.judge(record.candidate).ratios
    wanted = scale * _factor(ratio for name, ratio in ratios.items() if name not in limits.lowered)
    left = scale * _factor(ratio for name, ratio in ratios.items() if name in limits.lowered)
    wanted = min(wanted, max(left, min(scale, LEAST)))
    if before is not None and record.candidate_drift is not None and limits.caps_drift:
        wanted = min(wanted, max(scale * _clamped(_room(limits, before, record.candidate_drift)), min(scale, LEAST)))
    return min(1.0, wanted)


def _room(limits: Limits, before: Movement, proposed: Movement) -> float:
    """The smallest factor at which a proposal would have used `AIM` of the room below a cap."""
    caps = limits.without_budgets()
    starts, ends = (caps.judge(drift.still(), drift).ratios for drift in (before, proposed))
    factors = [CHANGE]
    for name, start in starts.items():
        end, aim = ends[name], start + AIM * max(1 - start, 0.0)
        if end > max(start, aim):
            factors.append((math.sqrt(aim) - math.sqrt(start)) / (math.sqrt(end) - math.sqrt(start)))
    return min(factors)


def _factor(ratios: Iterable[float]) -> float:
    """The factor at which a proposal would have used `AIM` of the budgets that it used these parts of."""
    largest = max(ratios, default=0.0)
    return _clamped(CHANGE if largest == 0 else math.sqrt(AIM / largest))


def _clamped(factor: float) -> float:
    return min(max(factor, 1 / CHANGE), CHANGE)
