"""The finished runs, sorted: figures by arm, condition and seed, and the contrasts between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

from study.config import ARMS, CONDITIONS, PLAN, PRIMARY, Arm, Batch, Condition, Study
from study.reporting import paired
from study.reporting.figures import Figures, figures
from study.reporting.paired import Contrast
from study.traces import Run

BASELINE = "fixed"
"""The condition that all others are compared with."""


@dataclass(frozen=True)
class Metric:
    """A figure that conditions are compared in."""

    symbol: str
    """heading in tables"""
    words: str
    """in sentences"""
    better: int
    """1 if more is better, -1 if less is"""

    @property
    def heading(self) -> str:
        """The symbol, and which way is better."""
        return f"{self.symbol} {'↑' if self.better > 0 else '↓'}"


METRICS: Mapping[str, Metric] = {
    "score": Metric("M", "the composite metric M", 1),
    "gain": Metric("ΔR", "the gain in held-out reward", 1),
    "stability": Metric("S_stability", "S_stability", 1),
    "worst_stability": Metric("S_worst", "S_worst", 1),
    "held_worst_max": Metric("max worst-slice K", "the largest worst-slice movement on held-out prompts", -1),
    "drift": Metric("drift", "the drift from the first policy", -1),
    "nll_change": Metric("ΔNLL", "the rise in NLL of the first policy's own responses", -1),
}
COMPONENTS = ("gain", "stability", "worst_stability")
"""Of M."""

HIGH = "high_lr"
"""The arm whose conditions are also compared with the baseline at its best learning rate."""


@dataclass(frozen=True)
class Evidence:
    """All runs of a study, finished or not."""

    runs: Sequence[Run]
    branches: Sequence[Mapping[str, Any]] = ()
    study: Study = field(default_factory=Study)
    plan: Sequence[Batch] = PLAN

    @cached_property
    def figures(self) -> dict[tuple[str, str], dict[int, Figures]]:
        """Figures by seed, for each arm and condition that has whole runs."""
        found: dict[tuple[str, str], dict[int, Figures]] = {}
        for run in sorted(self.whole_runs, key=lambda run: run.seed):
            found.setdefault((run.arm, run.condition), {})[run.seed] = figures(run, self.study)
        return found

    @property
    def whole_runs(self) -> list[Run]:
        """Runs with one record for each update, and at least one; `activation` complains of the others."""
        return [run for run in self.runs if run.records and len(run.records) == len(run.updates)]

    @property
    def arms(self) -> list[str]:
        """Arms that have runs, in the order of the config file."""
        return ordered({arm for arm, _ in self.figures}, ARMS)

    def conditions(self, arm: str) -> list[str]:
        """Conditions that have runs in an arm, in the order of the config file."""
        return ordered({condition for found, condition in self.figures if found == arm}, CONDITIONS)

    def of(self, arm: str, condition: str) -> dict[int, Figures]:
        """Figures by seed; empty if there are none."""
        return self.figures.get((arm, condition), {})

    def values(self, arm: str, condition: str, metric: str) -> dict[int, float | None]:
        """One figure by seed."""
        return {seed: getattr(found, metric) for seed, found in self.of(arm, condition).items()}

    def known(self, arm: str, condition: str, metric: str) -> list[float]:
        """One figure, of the seeds for which it is defined, and finite."""
        return [value for value in self.values(arm, condition, metric).values() if paired.is_known(value)]

    def contrast(
        self, metric: str, arm: str, condition: str, baseline: str = BASELINE, baseline_arm: str | None = None
    ) -> Contrast:
        """Condition minus baseline, paired by seed; the baseline may stand in another arm."""
        return paired.contrast(self.values(arm, condition, metric), self.values(baseline_arm or arm, baseline, metric))

    def family(self, metric: str, arm: str, baseline_arm: str | None = None) -> dict[str, Contrast]:
        """All conditions of an arm against the baseline in one figure, Holm over them; the primary contrast apart."""
        others = [
            condition
            for condition in self.conditions(arm)
            if (condition != BASELINE or baseline_arm not in (None, arm)) and (arm, condition) != PRIMARY[:2]
        ]
        return paired.corrected(
            {condition: self.contrast(metric, arm, condition, baseline_arm=baseline_arm) for condition in others}
        )

    @property
    def primary(self) -> dict[str, Contrast]:
        """The pre-registered contrast in every figure: M by itself, its three components with Holm over them."""
        arm, condition, baseline = PRIMARY
        found = {metric: self.contrast(metric, arm, condition, baseline) for metric in METRICS}
        return found | paired.corrected({metric: found[metric] for metric in COMPONENTS})

    @property
    def grid(self) -> list[str]:
        """Arms without shocks in which the baseline ran, by learning rate."""
        arms = [arm for arm in self.arms if self.of(arm, BASELINE) and not arm_of(arm).shocked]
        return sorted(arms, key=lambda arm: arm_of(arm).learning_rate)

    @property
    def tuned(self) -> str | None:
        """The arm of the grid with the best mean M: lr-tuned fixed KL."""
        return max(self.grid, key=lambda arm: fmean(self.known(arm, BASELINE, "score")), default=None)

    def limited(self, arm: str) -> list[str]:
        """Conditions of an arm that have a budget."""
        return [condition for condition in self.conditions(arm) if condition_of(condition).limits]

    @property
    def missing(self) -> dict[tuple[str, str], list[int]]:
        """Seeds that the plan has and the study has not, by arm and condition."""
        found: dict[tuple[str, str], list[int]] = {}
        for arm, condition, seed in planned(self.plan):
            if seed not in self.of(arm, condition):
                found.setdefault((arm, condition), []).append(seed)
        return found

    @property
    def seconds(self) -> dict[str, float]:
        """Compute by arm: the sum over its runs."""
        return {
            arm: sum(found.seconds for condition in self.conditions(arm) for found in self.of(arm, condition).values())
            for arm in self.arms
        }


def planned(plan: Sequence[Batch]) -> Iterator[tuple[str, str, int]]:
    """Every run of a plan, once."""
    runs = ((batch.arm, condition, seed) for batch in plan for condition in batch.conditions for seed in batch.seeds)
    return iter(dict.fromkeys(runs))


def condition_of(name: str) -> Condition:
    """The condition of that name; one that the config file does not have is called by its name."""
    return CONDITIONS.get(name) or Condition(name)


def arm_of(name: str) -> Arm:
    """The arm of that name; likewise."""
    return ARMS.get(name) or Arm(name, learning_rate=0.0)


def label(condition: str) -> str:
    """As in tables and pictures."""
    return condition_of(condition).label


def ordered(names: set[str], known: Mapping[str, Any]) -> list[str]:
    """Those of the config file in its order, then the others."""
    return [name for name in known if name in names] + sorted(names - set(known))
