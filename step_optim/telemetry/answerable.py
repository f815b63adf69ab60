"""Which budgets a log can answer for: those that limit what its steps have measured."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from step_optim.budget import AutoBudget, Budget
from step_optim.limits import Limits
from step_optim.telemetry.record import StepRecord


def answerable(budget: Budget) -> Budget:
    """Refuse a budget that no log can answer for.

    Raises:
        ValueError: an automatic one, one with a cap on the path, or one with a confidence.
    """
    if isinstance(budget, AutoBudget):
        raise ValueError(
            f"budget={budget!r} depends on the steps before; give numbers, those that it was fixed at, say"
        )
    if budget.path is not None or budget.path_slices is not None:
        raise ValueError(
            f"budget={budget!r} caps the path, and another budget would have led to another path: leave path= and "
            "path_slices= out"
        )
    if budget.confidence is not None:
        raise ValueError(
            f"budget.confidence={budget.confidence} needs the KL of each prompt, and a log keeps means: replay a "
            "budget without a confidence"
        )
    return budget


def limits_of(record: StepRecord, budget: Budget, slices: Collection[str] = ()) -> Limits:
    """Return a budget's limits at a step. All of them are on what was measured there, if the candidate is finite.

    Args:
        record: of the step.
        budget: schedules are taken at its index.
        slices: those of all steps of the log: at a step that has not measured one of these it is not limited.

    Raises:
        ValueError: the log does not have what is limited.

    >>> from step_optim.controllers.base import Action
    >>> from step_optim.movement import Movement
    >>> moved = Movement(0.01, {"math": 0.02})
    >>> limits_of(StepRecord(0, Action.COMMIT, moved, moved, Limits()), Budget(slices=0.01)).slices
    {'math': 0.01}
    """
    limits = budget.at(record.step, record.candidate.slices)
    if record.candidate.is_finite:
        _check_slices(record, budget, slices)
        _check_measured(record, limits)
    drift = record.candidate if record.candidate_drift is None else record.candidate_drift
    elsewhere = {*slices} - {*record.candidate.slices}
    return replace(
        limits,
        slices={name: limit for name, limit in limits.slices.items() if name not in elsewhere},
        drift_slices={n: cap for n, cap in limits.drift_slices.items() if n not in elsewhere or n in drift.slices},
    )


def _check_slices(record: StepRecord, budget: Budget, elsewhere: Collection[str]) -> None:
    """Refuse limits on slices that no step has; one for all of them, where there are none."""
    slices = record.candidate.slices
    drifts = slices if record.candidate_drift is None else record.candidate_drift.slices
    asked = budget.at(record.step, slices or ["any slice"])
    for part, by_slice, known in (("slices", asked.slices, slices), ("drift_slices", asked.drift_slices, drifts)):
        found = {*known, *elsewhere}
        missing = [name for name, limit in by_slice.items() if limit < math.inf and name not in found]
        if missing:
            raise ValueError(
                f"budget.{part} limits {missing[0]!r}, and step {record.step} of the log has "
                f"{f'the slices {sorted(known)}' if known else 'no slices'}"
            )


def _check_measured(record: StepRecord, limits: Limits) -> None:
    """Refuse limits on other figures that a step does not have."""
    if limits.caps_drift and record.candidate_drift is None:
        raise ValueError(
            f"budget caps the drift, and step {record.step} of the log has no drift of its candidate, which is only "
            f"measured under a cap; it has {_figures(record)}"
        )
    for name in ("prompt", "token"):
        if getattr(limits, name) < math.inf and getattr(record.candidate, name) is None:
            raise ValueError(
                f"budget.{name}={getattr(limits, name):g} limits the worst {name}, which step {record.step} of the log "
                f"does not have; it has {_figures(record)}"
            )


def _figures(record: StepRecord) -> str:
    """What the log has of a step's candidate."""
    candidate = record.candidate
    tails = [name for name in ("prompt", "token") if getattr(candidate, name) is not None]
    drift = [] if record.candidate_drift is None else ["drift"]
    return ", ".join(["mean", *(f"slice:{name}" for name in candidate.slices), *tails, *drift])
