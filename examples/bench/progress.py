"""What the screen shows while it works, and when time is up."""

from __future__ import annotations

import time


class Progress:
    """Lines with the elapsed time; knows the time budget."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds
        self.skipped: list[str] = []
        """What was left out, and why."""

    def say(self, text: str) -> None:
        """Show one line."""
        print(f"[{time.monotonic() - self._start:7.1f} s] {text}", flush=True)

    def allows(self, what: str) -> bool:
        """Whether there is time for something optional; if not, the report will say that it was skipped."""
        if time.monotonic() - self._start < self._seconds:
            return True
        self.skip(what, "the time budget was used up")
        return False

    def skip(self, what: str, why: str) -> None:
        """Leave something out."""
        self.skipped.append(f"{what}: {why}")
        self.say(f"skipped {what}: {why}")
