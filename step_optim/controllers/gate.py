"""Gate: feasible or nothing."""

from __future__ import annotations

import warnings

from step_optim.controllers.base import Controller, Outcome, Trial, checked_on_reject
from step_optim.controllers.interpolate import Interpolate

LIVELOCK = 8
"""Rejections in a row that are warned of."""

REMEDIES = (
    "Lower the learning rate, raise the budget, pass warm_start=True to STEPOptimizer, or shrink: Interpolate(), or "
    "Gate(patience=..., on_stall='shrink')"
)


class Gate(Controller):
    """Reject every infeasible candidate.

    With ``Budget(mean=...)`` it is the paper's global gate, with
    ``Budget(slices=...)`` its circuit breaker (section 3.3). A gate that rolls
    back everything can reject for ever: an Adam-like step is as long as its
    learning rate says, so that the next candidate moves as far as the last
    (examples/study/REPORT.md: 11 of 12 updates at a rate that is too high).
    `LIVELOCK` (8) rejections in a row without a patience are warned of.
    ``warm_start=True`` of the optimizer shortens the proposals until they fit;
    ``patience`` ends the row by shrinking one, and the record says so
    (``stalled``).

    Args:
        patience: rejections in a row before it gives up rejecting; None for never.
        on_stall: ``"shrink"`` commits the largest feasible part of the step
            (`Interpolate`); ``"raise"`` raises `GateStalled`, with the weights restored.
        on_reject: ``"restore"`` or ``"keep_state"``.

    Raises:
        ValueError: ``patience`` below 1, or an unknown option.
    """

    def __init__(self, patience: int | None = None, on_stall: str = "shrink", on_reject: str = "restore") -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience={patience} must be at least 1 rejection, or None")
        if on_stall not in ("shrink", "raise"):
            raise ValueError(f"on_stall={on_stall!r} is unknown; use 'shrink' or 'raise'")
        self.patience, self.on_stall, self.on_reject = patience, on_stall, checked_on_reject(on_reject)
        self.shrinks = patience is not None and on_stall == "shrink"

    def decide(self, trial: Trial) -> Outcome:
        """Reject, unless the patience is used up."""
        if self.patience is None or trial.rejected_in_a_row < self.patience:
            if self.patience is None and trial.rejected_in_a_row + 1 == LIVELOCK:
                warnings.warn(
                    f"{LIVELOCK} steps in a row were over budget and rejected (now {trial.candidate.movement}); steps "
                    f"that stay as long are rejected for ever. {REMEDIES}",
                    stacklevel=2,
                )
            return trial.reject()
        if self.on_stall == "raise":
            count, movement = trial.rejected_in_a_row, trial.candidate.movement
            raise GateStalled(f"{count} steps in a row were over budget (now {movement}). {REMEDIES}")
        found = Interpolate(memory=False).search_alpha(trial)
        return trial.reject(stalled=True) if found is None else trial.accept(found, stalled=True)

    def __repr__(self) -> str:
        return f"Gate(patience={self.patience}, on_stall={self.on_stall!r}, on_reject={self.on_reject!r})"


class GateStalled(RuntimeError):
    """A `Gate` rejected ``patience`` steps in a row and was told to raise."""
