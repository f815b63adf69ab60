"""Further trials of a kept step: what other alphas would have read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real

from step_optim.controllers.base import Point
from step_optim.flight.kept import KeptStep
from step_optim.flight.visit import Site, Visit
from step_optim.telemetry.record import StepRecord, TrialRecord

TOLERANCE = 0.01
"""Part of a KL by which two measurements of one candidate may differ before it is warned of: `Interpolate` searches
alpha to 0.01."""


def remeasured(site: Site, kept: KeptStep | None, alphas: Sequence[float]) -> StepRecord:
    """Return a kept step's record with further trials; see `STEPOptimizer.remeasure`."""
    chosen = checked_alphas(alphas)
    visit = Visit(site, kept)
    with visit, visit:
        visit.begin()
        _check_same(visit.kept, visit.trial.candidate)
        points = [visit.at(alpha) for alpha in chosen]
        visit.end()
    further = (TrialRecord(alpha, point.movement, point.feasible) for alpha, point in zip(chosen, points, strict=True))
    return replace(visit.kept.record, trials=(*visit.kept.record.trials, *further))


def checked_alphas(alphas: Sequence[float]) -> list[float]:
    """Refuse what are no parts of an update.

    >>> checked_alphas([0, 0.5])
    [0.0, 0.5]
    """
    numbers = isinstance(alphas, Sequence) and all(isinstance(alpha, Real) for alpha in alphas)
    if not numbers or not alphas:
        raise TypeError(f"alphas={alphas!r} is no list of parts of the update; give [0.25, 0.5], say")
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alphas={alphas!r}: {alpha!r} must be between 0 (theta_t) and 1 (the candidate)")
    return list(map(float, alphas))


def _check_same(kept: KeptStep, now: Point) -> None:
    """Warn if the candidate reads otherwise than at the step: old and new trials would be of different measurements."""
    then = kept.record
    for what, before, after in (("", then.candidate, now.movement), ("a drift of ", then.candidate_drift, now.drift)):
        if before is None or after is None or not before.is_finite:
            continue
        if not math.isclose(after.mean, before.mean, rel_tol=TOLERANCE):
            warnings.warn(
                f"the candidate of step {kept.step} reads {what}{after.mean:.4g} nats per token now, and read "
                f"{before.mean:.4g} then, so further trials do not go with those of the record: the KL closure "
                "measures other prompts, or from another pi_ref, or buffers are others by now (BatchNorm's, which no "
                "kept step has)",
                stacklevel=4,
            )
