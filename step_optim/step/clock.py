"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up seconds by phase.

    >>> clock = Clock()
    >>> with clock("audit"):
    ...     pass
    >>> clock.seconds["audit"] >= 0, clock.seconds["inner"]
    (True, 0.0)
    """

    def __init__(self) -> None:
        self.seconds = {"inner": 0.0, "snapshot": 0.0, "audit": 0.0, "search": 0.0}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time that the body takes to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
