"""The largest part of a logged step that other limits allow: between which measured points it lies, and about where."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from step_optim.controllers.base import Action
from step_optim.limits import Limits, Verdict
from step_optim.telemetry.record import StepRecord

NEAR_ZERO = 2.0
"""The power of alpha that a KL grows like near 0, where it has its minimum; taken below what was measured."""

HALVINGS = 60
"""Of [0, 1], for the root of a formula: to the last bits of a float64."""


class _Known(NamedTuple):
    alpha: float
    verdict: Verdict
    """KL / limit by constraint there; of a trial without the caps on the drift, which a log does not have of it."""


Line: TypeAlias = "list[_Known]"
"""What was measured on the way to the candidate, by alpha; the candidate last."""


@dataclass(frozen=True)
class LargestPart:
    """The largest part alpha of a step that keeps to some limits."""

    low: float
    """The largest alpha that was measured to be within them; 0 if none was."""
    high: float
    """The smallest alpha above that was measured to be beyond one of them; 1, the candidate, if no trial was."""
    estimate: float | None
    """About where alpha lies between the two; None where that cannot be told."""


def largest_part(record: StepRecord, limits: Limits) -> LargestPart:
    """Return the largest part of a step that is within other limits than the step's own.

    Known are KL 0 at alpha = 0, the trials that have an alpha, and the
    candidate at alpha = 1. If KL rises along the way, the largest part lies
    between `LargestPart.low` and `LargestPart.high`. The estimate is the
    smallest over all constraints j, of

    - a budget eps_j on the step: log K_j is taken for a straight line in log
      alpha between the two measured points next to eps_j, and for one of slope
      2 below the smallest one: KL has its minimum at alpha = 0. (The slope that
      was seen above is no better there, and far worse on the bent ways of
      ``by_layer``, where it changes as layers have made their whole step.)
    - a cap on the drift: a parabola through the drifts at alpha = 0 and 1 and
      at the part that was committed. Without that one its curvature is K_j of
      the candidate: both drift and movement are about half a squared length in
      the Fisher metric, which changes little over one step, so the drift is
      |v + alpha u|² with |u|² = K_j(1). There is no estimate if the drift
      before the step was not measured or was beyond the cap already: where such
      a step leads back at first and away then, its end is too uncertain.

    `controllers.curves` has a sharper model, for a search that measures what
    comes out: it keeps a little below the budget, and near what was measured.

    Args:
        record: of a step whose candidate is beyond the limits, and on which all that is limited was measured.
        limits: the others.

    Returns:
        Of a candidate that is not finite the estimate is the low end: no curve leads there.

    >>> from step_optim.movement import Movement
    >>> moved = Movement(0.04)
    >>> largest_part(StepRecord(0, Action.COMMIT, moved, moved, Limits()), Limits(mean=0.01))
    LargestPart(low=0.0, high=1.0, estimate=0.5)
    """
    line = _line(record, limits)
    low = max((alpha for i, (alpha, _) in enumerate(line) if _within(line[i:])), default=0.0)
    high = min(alpha for alpha, verdict in line if alpha > low and not verdict.feasible)
    if not line[-1].verdict.finite:
        return LargestPart(low, high, low)
    exceeded = {name for _, verdict in line for name, ratio in verdict.ratios.items() if ratio > 1}
    parts = [_meets_cap(name, record, limits, line) if _is_cap(name) else _meets(name, line) for name in exceeded]
    known = [part for part in parts if part is not None]
    estimate = min(max(min(known), low), high) if len(known) == len(parts) else None
    return LargestPart(low, high, estimate)


def judged(record: StepRecord, limits: Limits) -> Verdict:
    """Hold a candidate against other limits, as an optimizer would: of a cap that is exceeded before, "less than now".

    Raises:
        ValueError: what is limited was not measured.
    """
    drift = record.candidate_drift if limits.caps_drift else None
    if not record.candidate.is_finite:  # of which perhaps nothing was measured
        limits = Limits() if drift is None else limits.without_budgets()
    return limits.on_the_way_back(record.previous_drift).judge(record.candidate, drift)


def _line(record: StepRecord, limits: Limits) -> Line:
    on_step, in_force = limits.without_caps(), limits.on_the_way_back(record.previous_drift)
    known = {
        trial.alpha: on_step.judge(trial.movement)
        for trial in record.trials
        if trial.alpha is not None and 0 < trial.alpha < 1
    }
    if _shows_committed_part(record) and limits.caps_drift and record.reference_drift is not None:
        known[record.alpha or 0.0] = in_force.judge(record.accepted, record.reference_drift)
    elif _shows_committed_part(record):
        known[record.alpha or 0.0] = on_step.judge(record.accepted)
    return [_Known(alpha, known[alpha]) for alpha in sorted(known)] + [_Known(1.0, judged(record, limits))]


def _shows_committed_part(record: StepRecord) -> bool:
    return record.action is Action.SHRINK and record.alpha is not None and 0 < record.alpha < 1


def _within(line: Line) -> bool:
    """Whether the first of these is within all limits; a drift that it lacks is if a later one is, for drift rises."""
    here = line[0].verdict
    return here.feasible and all(
        name in here.ratios or any(verdict.ratios.get(name, math.inf) <= 1 for _, verdict in line)
        for name in line[-1].verdict.ratios
    )


def _is_cap(name: str) -> bool:
    return name.partition(":")[0] == "drift"


def _meets(name: str, line: Line) -> float:
    """Where a KL that begins at 0 reaches its budget."""
    known = [(alpha, verdict.ratios[name]) for alpha, verdict in line if 0 < verdict.ratios[name] < math.inf]
    beyond = next((i for i, (_, ratio) in enumerate(known) if ratio > 1), None)
    if beyond is None:
        return 0.0  # a budget of 0
    alpha, ratio = known[beyond]
    power = NEAR_ZERO
    if beyond > 0:
        before, within = known[beyond - 1]
        power = math.log(ratio / within) / math.log(alpha / before)
    return alpha * math.exp(-math.log(ratio) / power)


def _meets_cap(name: str, record: StepRecord, limits: Limits, line: Line) -> float | None:
    """Where a drift reaches its cap; None if it begins beyond it, or nobody knows where."""
    if record.previous_drift is None:
        return None
    start, end = limits.at_rest(record.previous_drift).ratios[name], line[-1].verdict.ratios[name]
    if start > 1:
        return None
    if end == math.inf:
        return 0.0  # a cap of 0
    bend = _bend(name, record, limits, line, start)
    return _last_below_1(lambda alpha: start + (end - start - bend) * alpha + bend * alpha**2)


def _bend(name: str, record: StepRecord, limits: Limits, line: Line, start: float) -> float:
    """The factor of alpha² in a drift / cap: as measured at the committed part, else that of the movement."""
    for alpha, verdict in line[:-1]:
        if math.isfinite(between := verdict.ratios.get(name, math.nan)):
            return ((between - start) / alpha - (line[-1].verdict.ratios[name] - start)) / (alpha - 1)
    _, _, slice_ = name.partition(":")
    return (record.candidate.slices[slice_] if slice_ else record.candidate.mean) / limits.of(name)


def _last_below_1(curve: Callable[[float], float]) -> float:
    """The alpha in [0, 1] at which a curve passes 1, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if curve(middle) <= 1 else (low, middle)
    return low
