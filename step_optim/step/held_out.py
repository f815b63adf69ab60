"""Held-out audits: how far a step moves the policy on prompts that decide nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from step_optim.audit.closure import KLClosure
from step_optim.host.ranks import PeerFailed, Ranks
from step_optim.movement import Movement
from step_optim.precision import widened
from step_optim.snapshot.snapshot import Snapshot
from step_optim.telemetry.record import StepRecord


class HeldOut:
    """Audits the held-out prompts of a KL closure at every n-th step.

    Args:
        kl: has them, or not.
        step: the step index.
        snapshot: has the weights.
        ranks: who reads them together.
        raises: whether an error there is raised; if not, the record has it, and the step is as if it had not been.
    """

    def __init__(self, kl: KLClosure, step: int, snapshot: Snapshot, ranks: Ranks, *, raises: bool) -> None:
        self._kl = kl.held_out
        self._due = self._kl is not None and step % kl.every == kl.every - 1
        self._snapshot, self._ranks, self._raises = snapshot, ranks, raises
        self._error: str | None = None

    def begin(self) -> None:
        """Read theta_t's policy, if this step is to be measured."""
        if self._kl is not None and self._due:
            with self._noting_errors(), self._ranks.together():
                self._kl.anchor()

    def noted(self, record: StepRecord) -> StepRecord:
        """Audit the weights that stand, and add what it says to the record."""
        if self._kl is None or not self._due:
            return record
        measured = record
        if self._error is None:
            with self._noting_errors():
                measured = self._measured(self._kl, record)
        if self._error is None:
            return measured
        return replace(record, held_out_error=self._error)

    def _measured(self, kl: KLClosure, record: StepRecord) -> StepRecord:
        with self._snapshot.watch_groups(), self._ranks.together():
            audit = kl.audit_with_drift()
            drift = kl.drift(audit)
        ratios = _ratio("step", audit.movement, record.accepted) | _ratio("drift", drift, record.reference_drift)
        return replace(record, held_out=audit.movement, held_out_drift=drift, generalisation=ratios)

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """Held-out prompts decide nothing: where errors of audits are no reason to stop, theirs are not either."""
        over = self._ranks.failed
        try:
            yield
            self._ranks.exchange(None)  # all have come so far
        except Exception as error:
            if self._raises or over or (isinstance(error, PeerFailed) and error.fatal):
                raise
            self._ranks.announce_failure(error, fatal=False)
            self._ranks.recover()
            self._error = f"{type(error).__name__}: {error}"


def _ratio(name: str, there: Movement | None, here: Movement | None) -> dict[str, float]:
    """Held-out over control, and the standard error of its logarithm; nothing where one of them is 0."""
    if there is None or here is None or not (there.is_finite and here.is_finite and there.mean > 0 and here.mean > 0):
        return {}
    counts = [len(moved.prompts or ()) for moved in (there, here)]
    error = math.hypot(there.precision.mean, here.precision.mean) * widened(min(counts))
    return {name: there.mean / here.mean, f"{name}_error": error}
