"""Warm start: propose at the learning rate that the last proposals have shown to be within the budget."""

from __future__ import annotations

import math
from dataclasses import replace

from step_optim.controllers.base import Action
from step_optim.telemetry.record import StepRecord

AIM = 0.8
"""Part of the budget that proposals aim at: at 1, every second one would be over it."""

CHANGE = 2.0
"""The scale is at most halved or doubled from one step to the next."""


def next_scale(scale: float, record: StepRecord) -> float:
    """Return the scale of the learning rates for the next proposal, in (0, 1].

    K grows like the square of the learning rate, so a proposal that used the
    part rho of its budget (the largest KL / budget) would have used `AIM` of it
    at sqrt(AIM / rho) times its rate. Drift from pi_ref does not shrink with the
    rate, and is left out. It is the radius of a trust region, which grows and
    shrinks with what the last step has shown.

    >>> from step_optim.budget import Limits
    >>> from step_optim.movement import Movement
    >>> def after(kl):
    ...     return StepRecord(0, Action.SHRINK, Movement(kl), Movement(0.0), Limits(mean=0.04))
    >>> next_scale(1.0, after(0.0576)), next_scale(0.5, after(0.02)), next_scale(1.0, after(0.02))
    (0.7453559924999299, 0.6324555320336759, 1.0)
    """
    limits = replace(record.budget, reference=math.inf)
    if record.action is Action.UNCHANGED or math.inf == min(limits.mean, *limits.slices.values(), math.inf):
        return scale
    if not record.candidate.is_finite:
        return scale / CHANGE
    largest = max(limits.judge(record.candidate).ratios.values())
    factor = CHANGE if largest == 0 else math.sqrt(AIM / largest)
    return min(1.0, scale * min(max(factor, 1 / CHANGE), CHANGE))
