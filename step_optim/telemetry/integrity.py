"""Did the conditions of a study differ at all? Two labels with one trace are not two conditions.

python -m step_optim integrity gate=a.jsonl interpolate=b.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from step_optim.telemetry.columns import Columns
from step_optim.telemetry.record import StepRecord


@dataclass(frozen=True)
class Report:
    """What `check` found."""

    never_acted: tuple[str, ...]
    """Runs with a finite budget whose controller never acted."""
    identical: tuple[tuple[str, str], ...]
    """Pairs of runs whose traces agree in every figure and decision."""
    trigger_rates: Mapping[str, float]
    """Triggers per step, by run."""

    @property
    def ok(self) -> bool:
        """Whether every controller acted and no two runs are identical."""
        return not self.never_acted and not self.identical

    def __str__(self) -> str:
        lines = [f"{label}: triggered on {rate:.1%} of its steps" for label, rate in self.trigger_rates.items()]
        lines += [f"NEVER ACTED: {label}; its budget never bound, it shows nothing" for label in self.never_acted]
        lines += [f"IDENTICAL: {a} and {b} have the same trace; they are one condition" for a, b in self.identical]
        return "\n".join([*lines, "ok" if self.ok else "not ok"])


def check(runs: Mapping[str, Sequence[StepRecord]]) -> Report:
    """Compare the traces of several runs.

    A run whose budgets are all infinite only measures: it is expected not to act.

    Args:
        runs: the records of each run, by label.

    Raises:
        ValueError: a run without records.
    """
    empty = [label for label, records in runs.items() if not records]
    if empty:
        raise ValueError(f"runs without records: {empty}; a run that logged nothing cannot be compared")
    signatures = {label: [_signature(record) for record in records] for label, records in runs.items()}
    return Report(
        tuple(label for label, records in runs.items() if _limited(records) and not _acted(records)),
        tuple((a, b) for a, b in combinations(runs, 2) if signatures[a] == signatures[b]),
        {label: sum(record.triggered for record in records) / len(records) for label, records in runs.items()},
    )


def check_columns(runs: Mapping[str, Columns]) -> Report:
    """Compare several runs that were read as columns; see `check`.

    Args:
        runs: each run, by label; none is empty.
    """
    return Report(
        tuple(label for label, run in runs.items() if bool(run.limited.any()) and not bool(run.triggered.any())),
        tuple((a, b) for a, b in combinations(runs, 2) if runs[a].same_trace(runs[b])),
        {label: float(run.triggered.double().mean()) for label, run in runs.items()},
    )


def _limited(records: Sequence[StepRecord]) -> bool:
    return any(record.budget.limits_anything for record in records)


def _acted(records: Sequence[StepRecord]) -> bool:
    return any(record.triggered for record in records)


def _signature(record: StepRecord) -> str:
    """All that a condition can change: what moved, what was decided, what it earned. Times and budgets are left out."""
    return repr(
        (
            record.step,
            record.action,
            record.alpha,
            record.candidate,
            record.accepted,
            record.update_norm,
            record.reference_drift,
            record.reward,
        )
    )
