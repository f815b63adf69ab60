"""Searches for the largest part of a step that the budgets allow. A controller asks one of them; see `search`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from step_optim.controllers.base import Point, Trial
from step_optim.controllers.search import largest_feasible, read_profile


@dataclass(frozen=True)
class Search:
    """How the largest feasible alpha is looked for.

    Raises:
        ValueError: an argument out of range.
    """

    tol: float = 0.01
    """Relative tolerance in alpha."""

    max_trials: int = 24
    """Audits at most, besides the candidate's; 24 bisections reach alpha = 1e-5 at tol=0.01."""

    min_alpha: float = 1e-4
    """The smallest alpha worth committing: below it the step is rejected, for it would spend the optimizer's moments
    on nothing."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the arguments."""
        if type(self) is Search:
            raise TypeError("Search is what searches have in common; use ModelSearch, Bisection or Backtracking")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol={self.tol} must lie between 0 and 1 (0.01: within 1 % of the largest alpha)")
        if self.max_trials < 1:
            raise ValueError(f"max_trials={self.max_trials} must be at least 1 audit")
        if not 0 <= self.min_alpha < 1:
            raise ValueError(f"min_alpha={self.min_alpha} must lie between 0 and 1")

    def find(self, trial: Trial) -> Point | None:
        """Return the best feasible point on the line; None if there is none."""
        trial.memory.pop("profile", None)  # of another search
        return self._find(trial)

    def _find(self, trial: Trial, **options: Any) -> Point | None:
        found = largest_feasible(
            trial.at,
            trial.candidate,
            at_zero=trial.previous.ratios,
            search=self.name,
            tol=self.tol,
            max_trials=self.max_trials,
            min_alpha=self.min_alpha,
            **options,
        )
        return None if found is None else found[1]


@dataclass(frozen=True)
class ModelSearch(Search):
    """Models sqrt(KL / budget) / alpha, which is nearly flat: about 2.4 audits at tol=0.01.

    Where the weights have few numbers between theta_t and the candidate
    (bf16), it works with the alpha that rounding leaves (`Trial.realised`): K
    is a parabola in that.

    >>> from step_optim import Interpolate
    >>> Interpolate(ModelSearch(strict=True)).line.max_trials
    24
    """

    strict: bool = False
    """It may stop on the slope of the measured curve. True makes it wait until an infeasible alpha within ``tol`` was
    seen, which costs about one more audit."""

    memory: bool = True
    """Whether it begins with what the last two searches of the same run found of the curve
    (``trial.memory["profile"]``, part of a checkpoint)."""

    name: ClassVar[str] = "model"

    def find(self, trial: Trial) -> Point | None:
        """Return the best feasible point on the line; None if there is none."""
        profile = dict(trial.memory.get("profile", {})) if self.memory else None
        found = self._find(trial, strict=self.strict, profile=profile, realised=trial.realised)
        trial.memory.pop("profile", None)
        if profile:
            trial.memory["profile"] = profile
        return found


@dataclass(frozen=True)
class Bisection(Search):
    """Halves the bracket until it is within the tolerance: about 9 audits at tol=0.01."""

    name: ClassVar[str] = "bisect"


@dataclass(frozen=True)
class Backtracking(Search):
    """Halves alpha until it is feasible, then bisects; with tol=0.5 plain backtracking."""

    name: ClassVar[str] = "backtrack"


SEARCHES: Mapping[str, type[Search]] = {kind.name: kind for kind in (ModelSearch, Bisection, Backtracking)}
"""By the names that controllers take."""


def check_profile(state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose profile is none, by any exception."""
    read_profile(state.get("profile", {}))
