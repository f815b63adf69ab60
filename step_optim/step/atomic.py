"""A step ends at theta_t or at theta_t+1, never in between, whatever happens in it."""

from __future__ import annotations

import copy
import logging
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType

import torch

from step_optim.controllers.gate import GateStalled
from step_optim.host.ranks import PeerFailed
from step_optim.host.undo import depth, finish
from step_optim.movement import Unmeasured
from step_optim.snapshot.entries import CannotKeep
from step_optim.step.step import Step
from step_optim.telemetry.record import StepRecord
from step_optim.telemetry.sinks import Sink

LOGGER = logging.getLogger("step_optim")


class Atomic:
    """Around a step's body: what was decided in it stands; if nothing was, everything is put back.

    Nest two of them: the outer one ends what an interrupt in the inner one's
    exit has left unfinished.

    Args:
        step: the step.
        sink: takes its record.
        on_error: whether an exception in the audit is raised or settled as a rejection.
    """

    def __init__(self, step: Step, sink: Sink, on_error: str) -> None:
        self._step, self._run, self._sink = step, step.run, sink
        self._rejects = on_error == "reject"
        self._depth, self._grad = depth(), torch.is_grad_enabled()
        self._controller = copy.deepcopy(step.run.controller.state_dict())
        self._memory = step.run.controller.copied(step.run.memory)
        self._unread = step.run.unread

    def __enter__(self) -> None:
        """Nothing has happened yet."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """End the step, unless that is done; True if the error is settled by a rejection."""
        try:
            finish(self._depth)
        finally:
            torch.set_grad_enabled(self._grad)
            settled = self._end(error)
        return settled

    def _end(self, error: BaseException | None) -> bool:
        step, run = self._step, self._run
        if step.ended:
            return False
        stands, record = step.record is not None, step.record
        settled = not stands and self._settles(error)
        if record is None:
            assert error is not None
            record = self._undo(error, fatal=not settled)
        notes, adaptive_rate = dict(run.notes), run.adaptive_rate and stands  # an exception says nothing about the rate
        now = time.perf_counter()
        budget, fixed = run.seen(record, step.kl)
        elapsed = {} if run.ended is None else {"elapsed": now - run.ended}
        record = replace(
            record,
            fixed_budget=fixed,
            seconds=step.clock.seconds | elapsed,
            reward=notes.pop("reward", None),
            success=notes.pop("success", True) and record.success,
            notes=notes,
        )
        progress = run.progress.after(record, adaptive_rate=adaptive_rate)
        run.progress, run.budget, run.open, run.notes, run.ended, step.ended = progress, budget, None, {}, now, True
        # An error of what keeps the step must not take the place of the error that is being raised.
        quiet = nullcontext if error is None or settled else partial(suppress, Exception)
        try:
            with quiet():
                self._give_to_recorder(record, stands=stands)
        finally:
            if stands:
                step.remember()
            step.release()
            if fixed and step.ranks.first:
                LOGGER.info("step %d: %r", record.step, budget)
            with quiet():
                try:
                    run.keep(record, step.kl)
                finally:
                    self._sink(record)
        return settled

    def _give_to_recorder(self, record: StepRecord, *, stands: bool) -> None:
        """Let the flight recorder have a step that stands, before `remember` lets theta_t go."""
        if stands and self._run.recorder is not None and self._step.ranks.first:
            self._run.recorder.take(record, self._step.snapshot, self._step.auditor.names)

    def _settles(self, error: BaseException | None) -> bool:
        if not (self._rejects and self._step.proposed) or isinstance(error, (GateStalled, Unmeasured, CannotKeep)):
            return False
        return not error.fatal if isinstance(error, PeerFailed) else isinstance(error, Exception)

    def _undo(self, error: BaseException, *, fatal: bool) -> StepRecord:
        self._step.restore()
        self._run.drift, self._run.unread = None, self._unread
        self._run.controller.load_state_dict(self._controller)
        self._run.memory = self._run.controller.copied(self._memory)
        self._step.ranks.announce_failure(error, fatal=fatal)
        return self._step.failed(error)
