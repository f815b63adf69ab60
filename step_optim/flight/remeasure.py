"""Further trials of a kept step: what other alphas would have read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch

from step_optim.flight.kept import KeptStep
from step_optim.flight.visit import Site, Visit
from step_optim.telemetry.record import StepRecord, TrialRecord


def remeasured(site: Site, kept: KeptStep | None, alphas: Sequence[float]) -> StepRecord:
    """Return a kept step's record with further trials; see `STEPOptimizer.remeasure`."""
    chosen = checked_alphas(alphas)
    visit = Visit(site, kept)
    with torch.inference_mode(False), visit, visit:
        visit.begin()
        points = [visit.at(alpha) for alpha in chosen]
        visit.end()
    further = (TrialRecord(alpha, point.movement, point.feasible) for alpha, point in zip(chosen, points, strict=True))
    return replace(visit.kept.record, trials=(*visit.kept.record.trials, *further))


def checked_alphas(alphas: Sequence[float]) -> list[float]:
    """Refuse what are no parts of an update.

    >>> checked_alphas([0, 0.5]), checked_alphas(torch.tensor([0.25]))
    ([0.0, 0.5], [0.25])
    """
    given: Any = alphas.tolist() if hasattr(alphas, "tolist") else alphas
    numbers = isinstance(given, Sequence) and all(isinstance(a, Real) and not isinstance(a, bool) for a in given)
    if not numbers or not given:
        raise TypeError(f"alphas={alphas!r} is no list of parts of the update; give [0.25, 0.5], say")
    for alpha in given:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alphas={alphas!r}: {alpha!r} must be between 0 (theta_t) and 1 (the candidate)")
    return list(map(float, given))
