"""Gate: feasible or nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from step_optim.controllers.base import Controller, Outcome, Trial, checked_on_reject
from step_optim.controllers.searches import ModelSearch


@dataclass(frozen=True)
class Gate(Controller):
    """Reject every infeasible candidate.

    With ``Budget(mean=...)`` it is the paper's global gate, with
    ``Budget(slices=...)`` its circuit breaker (section 3.3). A gate that rolls
    back everything can reject for ever: an Adam-like step is as long as its
    learning rate says, so that the next candidate moves as far as the last
    (examples/study/REPORT.md: 11 of 12 updates at a rate that is too high).
    Many rejections in a row are warned of, as of any controller (see `stall`),
    but not while a patience lasts. ``adaptive_rate=True`` of the optimizer
    shortens the proposals until they fit;
    ``patience`` ends the row by shrinking one, and the record says so
    (``stalled``).

    Raises:
        ValueError: ``patience`` below 1, or an unknown option.

    >>> import torch
    >>> from step_optim import STEPOptimizer
    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = STEPOptimizer(
    ...     torch.optim.SGD([weight], lr=1.0), kl=lambda: float(weight) ** 2, budget=0.5, controller=Gate()
    ... )
    >>> weight.grad = -torch.ones(1)
    >>> optimizer.step()
    >>> str(optimizer.last.action), weight.item()
    ('reject', 0.0)
    """

    patience: int | None = None
    """Rejections in a row before it gives up rejecting; None for never."""

    on_stall: str = "shrink"
    """``"shrink"`` commits the largest feasible part of the step (`ModelSearch`); ``"raise"`` raises `GateStalled`,
    with the weights restored."""

    on_reject: str = "restore"
    """``"restore"`` or ``"keep_state"``."""

    shrinks: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience={self.patience} must be at least 1 rejection, or None")
        if self.on_stall not in ("shrink", "raise"):
            raise ValueError(f"on_stall={self.on_stall!r} is unknown; use 'shrink' or 'raise'")
        checked_on_reject(self.on_reject)
        object.__setattr__(self, "shrinks", self.patience is not None and self.on_stall == "shrink")

    def decide(self, trial: Trial) -> Outcome:
        """Reject, unless the patience is used up."""
        if self.patience is None or trial.rejected_in_a_row < self.patience:
            return trial.reject()
        if self.on_stall == "raise":
            raise GateStalled(trial.explain())
        found = ModelSearch(memory=False).find(trial)
        return trial.reject(stalled=True) if found is None else trial.accept(found, stalled=True)


class GateStalled(RuntimeError):
    """A `Gate` rejected ``patience`` steps in a row and was told to raise."""
