"""Says what a process waits for, when it has been waiting for other processes for a long time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PATIENCE = 60.0
"""Seconds of waiting until the first warning."""

AGAIN = 300.0
"""Seconds from one warning to the next."""

LOGGER = logging.getLogger("step_optim")


@dataclass
class _Wait:
    what: str
    since: float
    told: float | None = None

    def tell(self, now: float) -> None:
        """Warn if it is time to."""
        if now - self.since < PATIENCE or (self.told is not None and now - self.told < AGAIN):
            return
        self.told = now
        LOGGER.warning(
            "%s has been waiting since %s (%.0f s): the other processes have not reached this step. Does every process "
            "wrap its optimizer in STEPOptimizer and call step() equally often? (process_group=None lets a process "
            "decide alone)",
            self.what,
            time.strftime("%H:%M:%S", time.localtime(time.time() - (now - self.since))),
            now - self.since,
        )


class Watchdog:
    """One thread for all waits of this process; it begins with the first, and looks once a second.

    torch itself says nothing until its timeout is over, half an hour as a rule.
    """

    def __init__(self) -> None:
        self._waits: dict[int, _Wait] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around a call that needs other processes.

        Args:
            what: who waits, and in what; the subject of a sentence.
        """
        if self._thread is None or not self._thread.is_alive():  # a fork does not take it along
            self._thread = threading.Thread(target=self._watch, name="step_optim watchdog", daemon=True)
            self._thread.start()
        wait = _Wait(what, time.monotonic())
        self._waits[id(wait)] = wait
        try:
            yield
        finally:
            self._waits.pop(id(wait), None)

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, PATIENCE / 4))
            for wait in list(self._waits.values()):
                wait.tell(time.monotonic())


WATCHDOG = Watchdog()
