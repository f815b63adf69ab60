"""Reading a log while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step_optim.host.paths import user_path
from step_optim.telemetry.log import checked_header, parsed
from step_optim.telemetry.record import StepRecord
from step_optim.telemetry.summary import Summary

KEPT = 400
"""Records that are kept: what a terminal has room for."""


class Follower:
    """What a log holds so far; `poll` reads what was added since.

    Args:
        path: of the log, which need not be there yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.header: Mapping[str, Any] = {}
        self.records: list[StepRecord] = []
        """The latest, in step order."""
        self.segments = 0
        """How often the run was started."""
        self._summary = Summary()
        self._at = 0

    @property
    def figures(self) -> dict[str, Any]:
        """Those of `summarise`, of all steps so far."""
        return self._summary.figures()

    def poll(self) -> bool:
        """Read the lines that are whole by now; whether there were any.

        Raises:
            ValueError: a line that is no record, or of a newer version.
            OSError: the log cannot be read.
        """
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self._at:  # another file by now
                self._begin()
            file.seek(self._at)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            self._take(line)
        return bool(whole)

    def _begin(self) -> None:
        self.header, self.records, self.segments, self._summary, self._at = {}, [], 0, Summary(), 0

    def _take(self, line: str) -> None:
        plain = parsed(line)
        if plain is None:
            raise ValueError(f"{self.path} has a line that is no JSON object: {line[:60]!r}")
        if "step_optim" in plain:
            self.header = checked_header(plain, self.path)
            self.segments += 1
            return
        try:
            record = StepRecord.from_dict(plain)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.path} has a line that is no record of a step ({error}): {line[:60]!r}") from error
        # A resumed run repeats steps. What they were before stays in the totals, as in `STEPOptimizer.summary`'s log.
        self.records = [*(old for old in self.records[-KEPT:] if old.step < record.step), record]
        self._summary = self._summary.plus(record)
