"""What other budgets would have caught, from the log of a run."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from step_optim.bound import Bound
from step_optim.budget import Budget
from step_optim.controllers.base import Action
from step_optim.limits import Limits
from step_optim.telemetry.answerable import answerable, limits_of
from step_optim.telemetry.largest_part import judged, largest_part
from step_optim.telemetry.record import StepRecord, jsonable

STEP_LOCAL = "each step is judged by itself, as it was proposed in the run that was logged: nothing is trained again"
"""What a replay is, for those who read its figures."""

NOT_FINITE = "not finite"
"""In the place of a constraint: the candidate was not finite; see `StepRecord.constraint`."""

WORST = 20
"""Caught steps that are shown, unless all are asked for."""


@dataclass(frozen=True)
class CaughtStep:
    """A step that the other budget would have caught."""

    step: int
    """Step index."""
    bound: str
    """The constraint with the largest KL / budget at the candidate, or "not finite"."""
    ratio: float
    """That KL / budget; infinite if the candidate was not finite. A cap on the drift that was exceeded before the step
    asks for less drift than before, as in a run: the ratio is to that, then."""
    alpha: float | None
    """About the largest part of the step within the other budget; None where that cannot be told."""
    interval: tuple[float, float]
    """The largest alpha that was measured to be within it, and the smallest above that was measured not to be."""
    triggered: bool
    """Whether the run's own budget caught it, too."""
    action: Action
    """What the run did."""
    own_alpha: float | None
    """The part that the run committed; None off the line."""


@dataclass(frozen=True)
class Replay:
    """What `replay` found: step by step, as the steps were proposed in the run that was logged.

    From the first step on that the other budget would have decided otherwise,
    another run would have gone another way: figures after it are hypothetical.
    """

    steps: int
    """How many steps were judged."""
    unchanged: int
    """How many more moved no weight."""
    errors: int
    """How many more ended in an error before their candidate was measured."""
    triggered: int
    """How many of the judged steps the run's own budget caught."""
    caught: tuple[CaughtStep, ...]
    """Those that the other budget would have caught, in order."""
    first_difference: int | None
    """Index of the first step that it would have decided otherwise; None if there is none."""
    before: int
    """How many judged steps lie before that one; all of them if there is none."""

    @property
    def after(self) -> int:
        """How many judged steps lie after the first difference."""
        return 0 if self.first_difference is None else self.steps - self.before - 1

    @property
    def by_constraint(self) -> Mapping[str, int]:
        """How many steps each constraint would have caught: the one with the largest KL / budget."""
        return dict(Counter(caught.bound for caught in self.caught).most_common())

    @property
    def alphas(self) -> list[float]:
        """The estimates of alpha, as far as there are any."""
        return [caught.alpha for caught in self.caught if caught.alpha is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; infinities become texts."""
        alphas = self.alphas
        counts = {name: getattr(self, name) for name in ("steps", "unchanged", "errors", "triggered")}
        plain: dict[str, Any] = jsonable(
            {
                "step_local": STEP_LOCAL,
                **counts,
                "caught": len(self.caught),
                "by_constraint": self.by_constraint,
                "alpha_min": min(alphas, default=None),
                "alpha_median": statistics.median(alphas) if alphas else None,
                "alpha_unknown": len(self.caught) - len(alphas),
                "first_difference": self.first_difference,
                "before": self.before,
                "after": self.after,
                "caught_steps": [asdict(caught) for caught in self.caught],
            }
        )
        return plain

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, most: int | None = WORST) -> Iterator[str]:
        """Yield what there is to say.

        Args:
            most: how many caught steps to show, those with the largest KL / budget; None for all.
        """
        yield STEP_LOCAL
        yield self._difference()
        caught, own = len(self.caught), self.triggered
        yield f"{caught} of {self.steps} steps would have been caught; the run's own budget caught {own}"
        if self.unchanged or self.errors:
            yield f"beside them {self.unchanged} steps moved nothing, and {self.errors} ended in an error"
        if self.caught:
            yield from self._distribution()
            yield from _table(self.caught, len(self.caught) if most is None else most)

    def _difference(self) -> str:
        if self.first_difference is None:
            return "no step would be decided otherwise"
        return (
            f"first step that would be decided otherwise: {self.first_difference} (steps before it: {self.before}; "
            f"after it: {self.after}, whose figures are hypothetical)"
        )

    def _distribution(self) -> Iterator[str]:
        for name, count in self.by_constraint.items():
            yield f"{f'bound by {name}':26} {count}"
        alphas = self.alphas
        unknown = f", unknown of {len(self.caught) - len(alphas)} steps" if len(alphas) < len(self.caught) else ""
        known = f"smallest {min(alphas):.3g}, median {statistics.median(alphas):.3g}" if alphas else "none known"
        yield f"{'alpha':26} {known}{unknown}"


def replay(records: Iterable[StepRecord], budget: Budget | Bound) -> Replay:
    """Tell which steps of a run another budget would have caught, and at what alpha. Nothing is trained.

    Each step is judged by itself, as it was proposed in the run that was
    logged. The first decision that differs would have led to other weights, so
    what is said of the steps after it (`Replay.after`) is hypothetical. A step
    that both budgets caught counts as decided alike if the same constraint
    with the same limit bound it and what was committed is within the other
    budget, too; or if the run rejected it, and no measured part of it is
    within the other budget.

    Whether a step is caught is exact: the candidate's figures are in the log.
    A candidate that is not finite is always caught. How alpha is told says
    `largest_part.largest_part`. It is the part of the way that the run's
    trials lay on: the straight line to the candidate, or with
    ``Interpolate(by_layer=...)`` the bent one. Weights off it (trials of
    `Project` and `Steer` without an alpha) say nothing about it; there alpha is
    what shrinking in the place of projecting or steering would have left.

    Args:
        records: of a run, in order.
        budget: the other one; schedules are taken at the index of each step.

    Raises:
        ValueError: a budget with a confidence, or an automatic one; a limit on what a step of the log did not measure.

    >>> from step_optim.movement import Movement
    >>> moved = [Movement(kl) for kl in (0.01, 0.04)]
    >>> run = [StepRecord(step, Action.COMMIT, kl, kl, Limits(mean=0.05)) for step, kl in enumerate(moved)]
    >>> found = replay(run, Budget(mean=0.02))
    >>> [(caught.step, caught.bound, caught.ratio, round(caught.alpha, 3)) for caught in found.caught]
    [(1, 'mean', 2.0, 0.707)]
    """
    records, budget = list(records), answerable(Budget.of(budget))
    moved = [record for record in records if record.action is not Action.UNCHANGED and not _failed(record)]
    known = {name for record in moved for name in record.candidate.slices}
    limits = [limits_of(record, budget, known) for record in moved]
    caught = [_caught(record, each) for record, each in zip(moved, limits, strict=True)]
    differs = [_differs(*step) for step in zip(moved, limits, caught, strict=True)]
    before = differs.index(True) if any(differs) else len(moved)
    return Replay(
        steps=len(moved),
        unchanged=sum(record.action is Action.UNCHANGED for record in records),
        errors=sum(map(_failed, records)),
        triggered=sum(record.triggered for record in moved),
        caught=tuple(step for step in caught if step is not None),
        first_difference=moved[before].step if before < len(moved) else None,
        before=before,
    )


def _failed(record: StepRecord) -> bool:
    """Whether it ended in an error; a candidate that is not finite is one, too, but was judged."""
    return record.error is not None and not record.triggered


def _caught(record: StepRecord, limits: Limits) -> CaughtStep | None:
    verdict = judged(record, limits)
    if verdict.feasible:
        return None
    bound = NOT_FINITE if not verdict.finite or verdict.binding is None else verdict.binding
    ratio = math.inf if bound == NOT_FINITE else verdict.ratios[bound]
    part = largest_part(record, limits)
    return CaughtStep(
        step=record.step,
        bound=bound,
        ratio=ratio,
        alpha=part.estimate,
        interval=(part.low, part.high),
        triggered=record.triggered,
        action=record.action,
        own_alpha=record.alpha,
    )


def _differs(record: StepRecord, limits: Limits, caught: CaughtStep | None) -> bool:
    """Whether the other budget would have led to another decision; see `replay`."""
    if caught is None or not record.triggered:
        return record.triggered or caught is not None
    if (record.bound or "").partition(":")[0] == "path":  # a cap that the other budget does not have
        return True
    if record.action is Action.REJECT:
        return caught.interval[0] > 0
    if caught.bound == NOT_FINITE:
        return limits != record.budget
    own, drift = record.budget, record.reference_drift if limits.caps_drift else None
    alike = record.bound == caught.bound and own.of(caught.bound) == limits.of(caught.bound) and own.confidence is None
    if not alike or (limits.caps_drift and drift is None):
        return True
    return not limits.on_the_way_back(record.previous_drift).judge(record.accepted, drift).feasible


def _table(caught: Sequence[CaughtStep], most: int) -> Iterator[str]:
    worst = sorted(caught, key=lambda step: step.ratio, reverse=True)[:most]
    yield f"{'step':>8}  {'bound':20} {'KL / budget':>11} {'alpha':>8}  {'between':18} the run's own"
    for step in sorted(worst, key=lambda step: step.step):
        low, high = step.interval
        own = "" if step.own_alpha is None else f" {step.own_alpha:.3g}"
        alpha = "-" if step.alpha is None else f"{step.alpha:.3g}"
        between = f"{low:.3g} and {high:.3g}"
        yield f"{step.step:>8}  {step.bound:20} {step.ratio:>11.3g} {alpha:>8}  {between:18} {step.action}{own}"
    if len(caught) > len(worst):
        left = len(caught) - len(worst)
        yield f"the other {left} caught steps, whose KL / budget is no larger, are left out: --all shows them"
