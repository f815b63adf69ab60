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

    What is spared is no part of the update here: all of it stands. To the decrease of the loss it counts.

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
    if outcome.action is Action.COMMIT:
        return 1.0, 1.0
    if outcome.point is None and not snapshot.spared:
        return 0.0, 0.0
    realised = _realised(outcome.point, snapshot, ranks)
    if one_gradient:
        return realised, _share(ranks, snapshot.descent())
    return realised, _share(ranks, snapshot.alignment()) if snapshot.spared else realised


def _realised(point: Point | None, snapshot: Snapshot, ranks: Ranks) -> float | None:
    if point is None or point.alpha == 1:
        return 0.0 if point is None else 1.0
    return _share(ranks, snapshot.alignment(spared=False), otherwise=math.nan)


def _share(ranks: Ranks, own: tuple[float, float], otherwise: float | None = None) -> float | None:
    """The first of two figures over the second, both summed over all processes; only if that is above 0."""
    part, whole = map(sum, zip(*ranks.exchange(own), strict=True))
    return part / whole if whole > 0 else otherwise
