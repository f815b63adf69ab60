"""Reading a log while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step_optim.host.paths import user_path
from step_optim.telemetry.log import read_each, read_log
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
        self._at = self._lines = 0
        """What was read: bytes, and lines."""

    @property
    def figures(self) -> dict[str, Any]:
        """Those of `summarise` for the log so far."""
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
        # Not splitlines(), which also splits at characters that JSON allows.
        lines = [f"{line.decode(errors='replace')}\n" for line in whole.split(b"\n")[:-1]]
        for header, record in read_each(lines, self.path, StepRecord.from_dict, first=self._lines + 1):
            if record is None:
                self.header, self.segments = header, self.segments + 1
            else:
                self._take(record)
        self._at, self._lines = self._at + len(whole), self._lines + len(lines)
        return bool(lines)

    def _begin(self) -> None:
        self.header, self.records, self.segments, self._summary = {}, [], 0, Summary()
        self._at = self._lines = 0

    def _take(self, record: StepRecord) -> None:
        if self.records and record.step <= self.records[-1].step:  # it replaces what was there, and all after it
            self.records = [old for old in self.records if old.step < record.step]
            self._summary = self._totals(record.step)
        self.records.append(record)
        self._summary = self._summary.plus(record)
        if len(self.records) > 2 * KEPT:
            del self.records[:-KEPT]

    def _totals(self, stop: int) -> Summary:
        """Of the steps before one, read anew."""
        summary = Summary()
        for known in read_log(self.path):
            if known.step < stop:
                summary = summary.plus(known)
        return summary
