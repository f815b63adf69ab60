"""Interpolate: the largest part of the step that the budgets allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from step_optim.controllers.base import Controller, Outcome, Point, Trial, checked_on_reject, checked_on_shrink
from step_optim.controllers.search import largest_feasible, read_profile

SEARCHES = ("model", "bisect", "backtrack")


@dataclass
class Interpolate(Controller):
    """Commit theta_t + alpha (candidate - theta_t) for the largest feasible alpha (the paper's section 3.3).

    The optimizer state stays the candidate's: for Adam-like optimizers the
    result is a step at lr * alpha. If no alpha is feasible within
    ``max_trials``, the step is rejected. Where the weights have few numbers
    between theta_t and the candidate (bf16), the model search works with the
    alpha that rounding leaves (`Trial.realised`): K is a parabola in that.

    Raises:
        ValueError: an argument out of range, or an unknown option.
    """

    search: str = "model"
    """``"model"`` (about 2.4 audits at tol=0.01), ``"bisect"`` (about 9), or ``"backtrack"`` (halve until feasible,
    then bisect; with tol=0.5 plain backtracking)."""

    tol: float = 0.01
    """Relative tolerance in alpha."""

    max_trials: int = 24
    """Audits at most, besides the candidate's; 24 bisections reach alpha = 1e-5 at tol=0.01."""

    strict: bool = False
    """The model search may stop on the slope of the measured curve. True makes it wait until an infeasible alpha
    within ``tol`` was seen, which costs about one more audit."""

    memory: bool = True
    """Whether the model search begins with what the last two searches of the same run found of the curve
    (``trial.memory["profile"]``, part of a checkpoint)."""

    min_alpha: float = 1e-4
    """The smallest alpha worth committing: below it the step is rejected, for it would spend the optimizer's moments
    on nothing."""

    on_reject: str = "restore"
    """``"restore"`` or ``"keep_state"``, if no alpha is feasible."""

    on_shrink: str = "keep_state"
    """The optimizer state of a step that was shrunk: ``"keep_state"`` the candidate's, ``"restore"`` theta_t's. In a
    window, gradients that were taken far beyond the budget stay in the candidate's moments; without them the next
    update gained more held-out reward, on 8 of 9 occasions (the branches in examples/study/REPORT.md)."""

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.search not in SEARCHES:
            raise ValueError(f"search={self.search!r} is unknown; use one of {SEARCHES}")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol={self.tol} must lie between 0 and 1 (0.01: within 1 % of the largest alpha)")
        if self.max_trials < 1:
            raise ValueError(f"max_trials={self.max_trials} must be at least 1 audit")
        if not 0 <= self.min_alpha < 1:
            raise ValueError(f"min_alpha={self.min_alpha} must lie between 0 and 1")
        checked_on_reject(self.on_reject)
        checked_on_shrink(self.on_shrink)

    def decide(self, trial: Trial) -> Outcome:
        """Shrink to the budget, or reject."""
        found = self.search_alpha(trial)
        return trial.reject() if found is None else trial.accept(found)

    def search_alpha(self, trial: Trial) -> Point | None:
        """Find the best feasible point on the line; None if there is none."""
        profile = dict(trial.memory.get("profile", {})) if self.memory and self.search == "model" else None
        found = largest_feasible(
            trial.at,
            trial.candidate,
            search=self.search,
            tol=self.tol,
            max_trials=self.max_trials,
            strict=self.strict,
            min_alpha=self.min_alpha,
            profile=profile,
            realised=trial.realised if self.search == "model" else None,
        )
        trial.memory.pop("profile", None)
        if profile:
            trial.memory["profile"] = profile
        return None if found is None else found[1]

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse what is no profile."""
        read_profile(state.get("profile", {}))
