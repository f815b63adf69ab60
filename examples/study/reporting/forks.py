"""The branching experiment: from one theta_t and one candidate, what each decision gives.

Branches are compared within their point (seed, t), so that the path up to there cancels. Points of one seed lie on one
path, and are scored with the same random numbers: they are averaged before seeds are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from study.reporting import paired
from study.reporting.figures import mean, worst
from study.reporting.paired import Contrast

ORDER = (
    "accept",
    "shrink",
    "project",
    "project_short",
    "reject",
    "reject_keep",
    "shrink_restore",
    "shrink_between",
    "rerun",
    "small",
)
LABELS = {
    "accept": "accept the candidate",
    "shrink": "shrink to the budget",
    "project": "project, 4 steps",
    "project_short": "project, 2 steps",
    "reject": "reject, roll moments back",
    "reject_keep": "reject, keep moments",
    "shrink_restore": "shrink, roll moments back",
    "shrink_between": "shrink, moments too",
    "rerun": "propose again at lr x alpha",
    "small": "unshocked learning rate",
}

Point = tuple[int, int]
"""Seed and update."""


@dataclass(frozen=True)
class Outcome:
    """A figure of a branch."""

    heading: str
    words: str
    """in sentences"""


OUTCOMES: Mapping[str, Outcome] = {
    "gain_now": Outcome("reward after", "held-out reward right after"),
    "gain_next": Outcome("after one more update", "held-out reward one update later"),
    "held": Outcome("K held-out", "held-out movement"),
    "held_worst": Outcome("worst slice held-out", "held-out worst-slice movement"),
    "control": Outcome("K control", "movement on the control set"),
    "control_next": Outcome("K control, next update", "the next update's movement on the control set"),
    "distance_control": Outcome("logit distance, control", "distance to the candidate's logits on the control set"),
    "distance_held": Outcome("logit distance, held-out", "distance to the candidate's logits on held-out prompts"),
    "seconds": Outcome("seconds", "time"),
}
"""Rewards are differences from that of theta_t; distances are mean squared, to the candidate."""


class Forks:
    """All branches, by name and point."""

    def __init__(self, branches: Sequence[Mapping[str, Any]]) -> None:
        self._found: dict[str, dict[Point, Mapping[str, Any]]] = {}
        for branch in branches:
            self._found.setdefault(branch["branch"], {})[branch["seed"], branch["t"]] = branch

    @property
    def names(self) -> list[str]:
        """Branches that were made, the usual ones first."""
        return [name for name in ORDER if name in self._found] + sorted(set(self._found) - set(ORDER))

    @property
    def outcomes(self) -> list[str]:
        """Figures that any branch has."""
        return [outcome for outcome in OUTCOMES if any(self.known(name, outcome) for name in self._found)]

    @property
    def points(self) -> list[Point]:
        """Where branches start."""
        return sorted({point for found in self._found.values() for point in found})

    @property
    def seeds(self) -> list[int]:
        """Seeds of these points."""
        return sorted({seed for seed, _ in self.points})

    def values(self, branch: str, outcome: str) -> dict[Point, float | None]:
        """One figure of a branch by point; None where it was not measured."""
        return {point: _figure(found, outcome) for point, found in self._found.get(branch, {}).items()}

    def differences(self, outcome: str, branch: str, baseline: str) -> dict[Point, float]:
        """Branch minus baseline, at every point that has both."""
        ours, theirs = self.values(branch, outcome), self.values(baseline, outcome)
        pairs = {point: (ours[point], theirs.get(point)) for point in ours}
        return {point: a - b for point, (a, b) in pairs.items() if paired.is_known(a) and paired.is_known(b)}

    def contrast(self, outcome: str, branch: str, baseline: str) -> Contrast:
        """Branch minus baseline, paired by point and averaged within each seed."""
        found: dict[int, list[float]] = {}
        for (seed, _), difference in self.differences(outcome, branch, baseline).items():
            found.setdefault(seed, []).append(difference)
        return paired.of({seed: fmean(differences) for seed, differences in found.items()})

    def family(self, outcome: str, baseline: str) -> dict[str, Contrast]:
        """All branches against one, Holm over them."""
        others = [name for name in self.names if name != baseline]
        return paired.corrected({name: self.contrast(outcome, name, baseline) for name in others})

    def means(self, branch: str) -> dict[str, float | None]:
        """Every figure of a branch, averaged over its points."""
        return {outcome: mean(self.known(branch, outcome)) for outcome in self.outcomes}

    def known(self, branch: str, outcome: str) -> list[float]:
        """One figure of a branch, of the points where it was measured."""
        return [value for value in self.values(branch, outcome).values() if value is not None]


def label(branch: str) -> str:
    """As in tables and pictures."""
    return LABELS.get(branch, branch.replace("_", " "))


def _figure(branch: Mapping[str, Any], outcome: str) -> float | None:
    if outcome in ("held", "control", "control_next"):
        return branch[outcome]["mean"] if outcome in branch else None
    if outcome == "held_worst":
        return worst(branch["held"])
    if outcome in ("gain_now", "gain_next"):
        reward, at = branch.get(f"reward_{outcome[5:]}"), branch.get("reward_at")
        return None if reward is None or at is None else reward - at
    value = branch.get(outcome)
    return None if value is None else float(value)
