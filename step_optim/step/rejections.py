"""What is known when steps are rejected in a row."""

from __future__ import annotations

from step_optim.controllers.base import Point
from step_optim.movement import Movement
from step_optim.step.auditor import Auditor
from step_optim.step.progress import Run
from step_optim.step.stall import Stall


def stall_of(
    run: Run, auditor: Auditor, candidate: Point, rejected: int, update_norm: float, still: Movement | None
) -> Stall:
    """Put together what is known, while the weights are theta_t.

    Args:
        run: what is remembered of the steps before.
        auditor: of this step.
        candidate: what it proposed.
        rejected: how many steps in a row were.
        update_norm: L2 norm of the proposed update.
        still: what a plain function reads at theta_t, if that was looked at.
    """
    constraint = candidate.constraint
    return Stall(
        rejected,
        run.progress.bound_by(auditor.limits.told(constraint)),
        candidate,
        auditor.limits,
        update_norm,
        tried=auditor.audited[1:],
        drift=auditor.drift() if constraint.startswith("drift") else None,
        still=still,
        rounded=auditor.rounded,
        adaptive_rate=run.adaptive_rate,
    )
