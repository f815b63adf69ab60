"""Alerts: what somebody who is away from a run should be told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from step_optim.controllers.base import Action
from step_optim.telemetry.record import StepRecord

KINDS = ("trigger", "stall", "cap", "error")
"""A candidate over the budget of a step; rejections in a row; a candidate over a cap; a step that went wrong."""

QUIET = 100
"""Steps without an event after which the next one of its kind is told again."""

CAPS = ("drift", "path")
"""How the names of constraints begin that bound a run, and not a step."""

NOT_FINITE = "not finite"
"""The constraint of a candidate that is not finite; see `StepRecord.constraint`."""

STALL = 5
"""Rejections in a row that are told of; then ten times as many, and so on."""


def is_told(rejected_in_a_row: int) -> bool:
    """Whether to tell of a streak at this length: 5, 50, 500, ...

    >>> [count for count in range(1, 1000) if is_told(count)]
    [5, 50, 500]
    """
    while rejected_in_a_row > STALL and rejected_in_a_row % 10 == 0:
        rejected_in_a_row //= 10
    return rejected_in_a_row == STALL


@dataclass(frozen=True)
class Alert:
    """Something to be told."""

    kind: str
    """trigger, stall, cap or error."""
    title: str
    """A few words."""
    text: str
    """A sentence, with the step and its figures."""
    level: str
    """``"info"``, ``"warn"`` or ``"error"``."""
    step: int
    """Step index."""


def check_kinds(kinds: Collection[str]) -> frozenset[str]:
    """Read the argument ``alerts=``.

    Raises:
        TypeError: no collection.
        ValueError: an unknown kind.
    """
    if isinstance(kinds, str) or not isinstance(kinds, Collection):
        raise TypeError(f"alerts={kinds!r} is no tuple: choose from {KINDS}; () for none")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"alerts={kinds!r}: {unknown[0]!r} is unknown; choose from {KINDS}, () for none")
    return frozenset(kinds)


class Alerts:
    """Tells events of a run once, and again after they have stayed away.

    A run at its cap triggers at every step. So an event is told if the latest
    one like it (with the same constraint, or the same kind of error) is more
    than `QUIET` steps ago, or none was. A streak of rejections is told at 5,
    50, 500, ..., counted from the first step that this object sees.

    Args:
        send: takes an alert.
        kinds: of `KINDS`, what is told.

    >>> from step_optim.limits import Limits
    >>> from step_optim.movement import Movement
    >>> alerts = Alerts(lambda alert: print(alert.title, "-", alert.text))
    >>> record = StepRecord(7, Action.SHRINK, Movement(0.06), Movement(0.03), Limits(0.03), True, "mean", alpha=0.7)
    >>> alerts(record), alerts(record)
    STEP: over budget, mean - Step 7: mean at 2 times its budget; shrink, alpha 0.7.
    (None, None)
    """

    def __init__(self, send: Callable[[Alert], None], kinds: Collection[str] = KINDS) -> None:
        self._send, self._kinds = send, check_kinds(kinds)
        self._latest: dict[tuple[str, str], int] = {}
        self._rejected = 0

    def __call__(self, record: StepRecord) -> None:
        """Tell what there is to be told of a step."""
        for alert, subject in self._events(record):
            if alert.kind in self._kinds and self._is_news(alert.kind, subject, record.step):
                self._send(alert)

    def _events(self, record: StepRecord) -> Iterator[tuple[Alert, str]]:
        """Yield what happened, and what it is about."""
        constraint, step = record.constraint, record.step
        self._count(record)
        if record.error is not None and constraint != NOT_FINITE:
            kind = record.error.partition(":")[0]
            yield Alert("error", f"STEP: a step failed, {kind}", f"Step {step}: {record.error}", "error", step), kind
        if constraint is not None:
            text = f"Step {step}: {_against(constraint, record)}; {_decision(record)}."
            if constraint.startswith(CAPS):
                yield Alert("cap", f"STEP: at the cap, {constraint}", text, "warn", step), constraint
            else:
                yield Alert("trigger", f"STEP: over budget, {constraint}", text, "info", step), constraint
        if record.stalled:
            text = f"Step {step}: the gate's patience was used up; {_decision(record)}."
            yield Alert("stall", "STEP: stalled", text, "error", step), "patience"
        elif self._rejected and is_told(self._rejected):
            text = f"Step {step}: {self._rejected} steps in a row were rejected, the latest by {constraint}."
            yield Alert("stall", "STEP: stalled", text, "error", step), f"streak that ends at {step}"

    def _count(self, record: StepRecord) -> None:
        if record.constraint is not None and record.action is Action.REJECT:
            self._rejected += 1
        elif record.triggered or record.action is Action.COMMIT:
            self._rejected = 0

    def _is_news(self, kind: str, subject: str, step: int) -> bool:
        latest, self._latest[kind, subject] = self._latest.get((kind, subject)), step
        return latest is None or not 0 <= step - latest <= QUIET


def _against(constraint: str, record: StepRecord) -> str:
    """Say how far over its budget a candidate was."""
    if constraint == NOT_FINITE:
        return "the candidate is not finite"
    kind, limit = "cap" if constraint.startswith(CAPS) else "budget", record.budget.of(constraint)
    figures = record.candidate_drift if constraint.startswith("drift") else record.candidate
    if figures is None or not limit:
        return f"{constraint} is over its {kind} of {limit:g}"
    name = record.budget.judged_as(constraint)
    reading = record.candidate_bounds.get(name)
    reading = record.budget.reading(constraint, figures) if reading is None else reading
    if name != constraint:
        left = record.budget.of(name)
        return f"{constraint} has {left:.3g} of its cap of {limit:.3g} left, and the candidate takes {reading:.3g}"
    return f"{constraint} at {reading / limit:.3g} times its {kind}"


def _decision(record: StepRecord) -> str:
    return str(record.action) if record.alpha is None else f"{record.action}, alpha {record.alpha:.3g}"
