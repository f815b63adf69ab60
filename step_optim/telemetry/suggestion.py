"""Budgets for the next run, from the log of the last one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from step_optim.budget import Budget
from step_optim.telemetry.record import StepRecord
from step_optim.trigger_rate import SLICE, budgets_at, checked_rate, figures, intervals_at, rounded_up

DIGITS = 3
"""Of a suggested budget: the intervals are wider than that."""


@dataclass(frozen=True)
class Suggestion:
    """What `suggest_budget` found. KL in nats per token, shares between 0 and 1."""

    budgets: Mapping[str, float]
    """By constraint, "mean" and "slice:<name>"."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % intervals for the budgets that exactly the asked share of all steps like these would be over."""
    exceeded: Mapping[str, float]
    """Share of these steps that were over each budget."""
    triggered: float
    """Share of these steps that were over any of them."""
    steps: int
    """How many steps there are."""
    skipped: int
    """How many steps before these were left out."""
    confidence: float | None
    """Of the log's own budgets, whose figures were upper bounds; these are for the figures themselves."""

    @property
    def budget(self) -> Budget:
        """The budget that is suggested."""
        slices = {name.removeprefix(SLICE): kl for name, kl in self.budgets.items() if name != "mean"}
        return Budget(mean=self.budgets["mean"], slices=slices or None)

    @property
    def line(self) -> str:
        """The same, to be pasted into a program."""
        budget = self.budget
        return f"Budget(mean={budget.mean}{f', slices={budget.slices}' if budget.slices else ''})"

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"from {self.steps} steps{f', without the first {self.skipped}' if self.skipped else ''}"
        for name, kl in self.budgets.items():
            low, high = self.intervals[name]
            yield f"{name:26} {kl:<8g} [{low:.3g}, {high:.3g}]  {self.exceeded[name]:.1%} of the steps were over it"
        yield f"{self.triggered:.1%} of the steps were over one of them"
        if self.confidence is not None:
            yield f"the log's own budgets were held against upper bounds (confidence={self.confidence}); these are not"
        yield self.line


def suggest_budget(records: Iterable[StepRecord], trigger_rate: float = 0.05, *, skip: int = 0) -> Suggestion:
    """Suggest budgets that about this share of the steps of another run like this would be over.

    They are those of `trigger_rate.budgets_at`, for the mean and each slice
    that all steps measured, rounded up to three digits; the intervals are of
    `trigger_rate.intervals_at`.

    Args:
        records: of a run, in order; steps that changed nothing, or ended in an error, say nothing.
        trigger_rate: of steps, not of steps and constraints.
        skip: how many of the records to leave out, the first ones.

    Raises:
        TypeError: a rate that is no number.
        ValueError: a rate that is not between 0 and 1; fewer than two steps.

    >>> from step_optim.controllers import Action
    >>> from step_optim.limits import Limits
    >>> from step_optim.movement import Movement
    >>> moved = [Movement(kl) for kl in (0.03, 0.01, 0.02, 0.01, 0.02)]
    >>> records = [StepRecord(t, Action.COMMIT, kl, kl, Limits()) for t, kl in enumerate(moved)]
    >>> suggest_budget(records).line
    'Budget(mean=0.0508)'
    """
    rate, records = checked_rate(trigger_rate), list(records)
    moved = [record for record in records[max(skip, 0) :] if record.shows_movement]
    if skip < 0 or len(moved) < 2:
        raise ValueError(
            f"{len(moved)} of {len(records)} records, skip={skip} left out, have a candidate that moved the policy; a "
            "budget takes at least two of them, better 20"
        )
    steps = [figures(record.candidate) for record in moved]
    budgets = {name: rounded_up(kl, DIGITS) for name, kl in budgets_at(steps, rate, ahead=False).items()}
    over = [[name for name, kl in budgets.items() if step[name] > kl] for step in steps]
    return Suggestion(
        budgets,
        intervals_at(steps, rate),
        {name: _share(name in names for names in over) for name in budgets},
        _share(map(bool, over)),
        len(steps),
        skip,
        next((record.budget.confidence for record in moved if record.budget.confidence is not None), None),
    )


def _share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / len(found)
