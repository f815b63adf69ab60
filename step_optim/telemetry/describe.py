"""What becomes a record: what was decided in a step, and what was measured on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from step_optim.controllers.base import Action, Outcome, Point
from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.telemetry.record import StepRecord, TrialRecord


@dataclass(frozen=True)
class Measurements:
    """What is known of a step whatever was decided."""

    step: int
    """The step index."""
    budget: Limits
    """The budgets in force."""
    exceeded_before: tuple[str, ...]
    """Caps that theta_t exceeds."""
    previous_drift: Movement | None
    """Of theta_t from pi_ref, if there is a cap."""
    pull: Mapping[str, float]
    """Shares of the loss's gradient that caps pulled by."""
    slices: tuple[str, ...]
    """What the KL closure measures besides the mean, as far as it says."""
    trials: tuple[TrialRecord, ...]
    """Audits beyond the candidate's."""
    update_norm: float
    """L2 norm of the proposed update."""
    lr: tuple[float, ...]
    """Learning rate of each parameter group."""
    scale: float
    """What the proposal multiplied them by."""
    reference_renewed: bool
    """Whether somebody else has written weights since the last step."""
    kept: int = 0
    """How many tensors keep their whole step, though the step was not committed as a whole."""
    probes: int = 0
    """Audits and gradients that told what the KL closure reads."""

    def fields(self) -> dict[str, Any]:
        """Those that a record has under the same names."""
        return {name: value for name, value in vars(self).items() if name != "slices"}


def decided(
    known: Measurements,
    outcome: Outcome,
    candidate: Point | None,
    alpha_realised: float | None,
    progress: float | None,
    drift: Movement | None,
) -> StepRecord:
    """Return the record of a step that was decided.

    Args:
        known: what was measured.
        outcome: what stands.
        candidate: what was proposed; None if it moved no weight.
        alpha_realised: the part of the update that stands, after rounding.
        progress: the share of the candidate's first-order decrease that stands.
        drift: of what stands, from pi_ref.
    """
    accepted, moved = outcome.point, candidate is not None
    proposed = Movement.everywhere(0.0, known.slices) if candidate is None else candidate.movement
    return StepRecord(
        **known.fields(),
        action=outcome.action,
        candidate=proposed,
        accepted=proposed.still() if accepted is None else accepted.movement,
        triggered=candidate is not None and not candidate.feasible,
        bound=None if candidate is None else _bound(known.budget, candidate),
        candidate_bounds=_bounds(known.budget, candidate),
        accepted_bounds=_bounds(known.budget, accepted),
        alpha=None if not moved else 0.0 if accepted is None else accepted.alpha,
        alpha_realised=alpha_realised if moved else None,
        progress=progress if moved else None,
        stalled=outcome.stalled,
        projection=outcome.projection,
        steering=outcome.steering,
        layers=outcome.layers,
        candidate_drift=None if candidate is None or not known.budget.caps_drift else candidate.drift,
        reference_drift=drift,
        error=None if proposed.is_finite else _not_finite(known, proposed),
        success=proposed.is_finite,
    )


def _bound(limits: Limits, candidate: Point) -> str | None:
    binding = candidate.verdict.binding
    return None if binding is None else limits.told(binding)


def _bounds(limits: Limits, point: Point | None) -> dict[str, float]:
    return {} if point is None else limits.bounds(point.movement, point.drift)


def failed(known: Measurements, error: BaseException) -> StepRecord:
    """Return the record of a step that ended in an error."""
    return StepRecord(
        **known.fields(),
        action=Action.REJECT,
        candidate=Movement.everywhere(math.nan, known.slices),
        accepted=Movement.everywhere(0.0, known.slices),
        error=f"{type(error).__name__}: {error}",
        success=False,
    )


def _not_finite(known: Measurements, candidate: Movement) -> str:
    if not math.isfinite(known.update_norm):
        return f"the update is not finite (norm {known.update_norm})"
    return f"the candidate's KL is not finite: mean {candidate.mean}, worst {candidate.worst}"
