"""How much of a candidate stands: of the update, after rounding, and of the decrease of the loss that it promised."""

from __future__ import annotations

import math

from step_optim.controllers.base import Action, Outcome, Point
from step_optim.host.ranks import Ranks
from step_optim.snapshot.snapshot import Snapshot


def kept(
    outcome: Outcome, candidate: Point | None, snapshot: Snapshot, ranks: Ranks, *, one_gradient: bool
) -> tuple[float | None, float | None]:
    """Return the parts of the update and of the first-order decrease of the loss that stand, while they do.

    Args:
        outcome: what was decided.
        candidate: what was proposed; None if it moved no weight.
        snapshot: has the weights.
        ranks: who has parts of them.
        one_gradient: whether what is in ``.grad`` is what the inner step was made of. Those of a window are of many
            points: the step itself stands for them.

    Returns:
        None for what there was nothing of.
    """
    if candidate is None:
        return None, None
    if outcome.point is None or outcome.action is Action.COMMIT:
        share = float(outcome.action is Action.COMMIT)
        return share, share
    realised = _share(ranks, snapshot.alignment(), otherwise=math.nan) if outcome.point.alpha != 1 else 1.0
    return realised, _share(ranks, snapshot.descent()) if one_gradient else realised


def _share(ranks: Ranks, own: tuple[float, float], otherwise: float | None = None) -> float | None:
    """The first of two figures over the second, both summed over all processes; only if that is above 0."""
    part, whole = map(sum, zip(*ranks.exchange(own), strict=True))
    return part / whole if whole > 0 else otherwise
