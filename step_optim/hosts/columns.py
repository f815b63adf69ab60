"""The figures that a framework's own logs get."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from step_optim.optimizer import STEPOptimizer
from step_optim.telemetry.record import StepRecord
from step_optim.telemetry.summary import summarise

OF_THE_STEPS = (
    "mean_candidate_kl",
    "mean_accepted_kl",
    "max_accepted_kl",
    "max_accepted_slice_kl",
    "trigger_rate",
    "rejection_rate",
    "mean_alpha",
    "mean_progress",
    "errors",
    "overhead_share",
)
"""Of the steps since the last row; see `Summary.figures`."""

OF_THE_RUN = ("path_length", "reference_drift", "generalisation_step", "generalisation_drift")
"""Of all steps so far."""


def columns(records: Sequence[StepRecord], optimizer: STEPOptimizer) -> dict[str, float]:
    """Return one row: numbers under ``step_optim/...``, without those that were not measured.

    Args:
        records: the steps since the last row, at least one.
        optimizer: has the figures of the run.
    """
    recent, run = summarise(records), optimizer.summary()
    figures = {name: recent[name] for name in OF_THE_STEPS} | {name: run[name] for name in OF_THE_RUN}
    row = {"step": records[-1].step, **figures}
    return {f"step_optim/{name}": float(value) for name, value in row.items() if value is not None}


def step_optimizer(optimizer: Any) -> STEPOptimizer | None:
    """Find the `STEPOptimizer` inside of a framework's wrappers; None if there is none."""
    while not isinstance(optimizer, STEPOptimizer):
        optimizer = vars(optimizer).get("optimizer") if hasattr(optimizer, "__dict__") else None
        if optimizer is None:
            return None
    return optimizer


class Recent:
    """The records since the last row.

    Args:
        most: of the latest ones, how many are kept at most; None for all.
    """

    def __init__(self, most: int | None = None) -> None:
        self._records: deque[StepRecord] = deque(maxlen=most)
        self._last: StepRecord | None = None

    def begin(self, optimizer: STEPOptimizer) -> None:
        """Forget the records so far."""
        self._records.clear()
        self._last = optimizer.last

    def see(self, optimizer: STEPOptimizer) -> None:
        """Take the record of the latest step, if it is a new one."""
        if optimizer.last is not None and optimizer.last is not self._last:
            self._last = optimizer.last
            self._records.append(optimizer.last)

    def row(self, optimizer: STEPOptimizer) -> dict[str, float]:
        """Return a row of them; an empty one if there are none."""
        return columns(self._records, optimizer) if self._records else {}

    def take(self, optimizer: STEPOptimizer) -> dict[str, float]:
        """Return a row of them, and begin the next one."""
        row = self.row(optimizer)
        self._records.clear()
        return row
