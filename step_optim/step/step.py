"""One step in progress: begin at theta_t, propose, decide, and end at theta_t or at one audited point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from step_optim.audit.closure import Audit, KLClosure
from step_optim.controllers.base import Action, Outcome, Point
from step_optim.host.hooks import inner_step
from step_optim.host.ranks import PeerFailed, Ranks
from step_optim.movement import Movement
from step_optim.snapshot.snapshot import Snapshot
from step_optim.snapshot.weights import Update
from step_optim.step.auditor import Auditor
from step_optim.step.clock import Clock
from step_optim.step.held_out import HeldOut
from step_optim.step.keeping import Keeping
from step_optim.step.kept import kept
from step_optim.step.measurable import below_noise
from step_optim.step.progress import Run
from step_optim.step.proposal import has_gradient, learning_rates, loss_closure, scaled_rates
from step_optim.step.pulled import Pulled
from step_optim.step.rejections import stall_of
from step_optim.step.staleness import Staleness, anchored_before
from step_optim.step.stall import Stall
from step_optim.telemetry.alerts import is_told
from step_optim.telemetry.describe import Measurements, decided, failed
from step_optim.telemetry.record import StepRecord


class Step:
    """One transaction on the policy: the paper's Algorithm 1.

    `begin` captures theta_t, `propose` runs the inner step, `decide` leaves the candidate, an audited part of it, or
    theta_t in the weights. What is decided stands with `record`; if anything fails before that, `restore` puts
    everything back.

    Args:
        run: what is remembered between steps.
        optimizer: the inner optimizer.
        snapshot: captures and moves the weights.
        ranks: who has to agree.
        kl: measures movement in this step.
        may_wait: whether it may turn out after the inner step that the reference was not theta_t's policy. Not where a
            forward inside the step may move buffers.
        raises: whether an error of an audit is raised, and not settled as a rejection.
    """

    def __init__(
        self,
        run: Run,
        optimizer: Optimizer,
        snapshot: Snapshot,
        ranks: Ranks,
        kl: KLClosure,
        *,
        may_wait: bool,
        raises: bool,
    ) -> None:
        self.run, self.optimizer, self.snapshot, self.ranks, self.kl = run, optimizer, snapshot, ranks, kl
        self._raises = raises
        self._may_wait = may_wait and kl.takes_any_weights and ranks.size == 1
        self.clock = Clock()
        self.auditor = Auditor(kl, run.budget, run.begin(), run.progress.step, snapshot, ranks)
        self._keeping = Keeping(run, optimizer, snapshot, self.auditor, ranks)
        self._held_out = HeldOut(kl, run.progress.step, snapshot, ranks, raises=raises)
        self.lr: tuple[float, ...] = ()
        self.scale = run.progress.scale if run.adaptive_rate else 1.0
        self.pull: Mapping[str, float] = {}
        """How strongly caps pulled at the latest inner step; see `Pulled`."""
        self.update_norm = 0.0
        self.rewind = True
        """Whether a rollback rewinds the random streams."""
        self.proposed = self.ended = False
        """Whether there is a candidate; whether the step has ended, one way or the other."""
        self.record: StepRecord | None = None
        """What was decided. From here on the step stands."""
        self.in_body = self.windowed = False
        """Whether the body of a window runs; whether one has."""
        self.idle: bool | None = None
        """Whether all inner steps so far had neither a gradient nor a loss closure; None before the first."""
        self.renewed = False
        """Whether somebody else has written weights since the last step, so that the reference was taken anew."""
        self._staleness = Staleness(kl, None, None, True)
        self._reference_is_stale = False
        """Whether the reference still is another policy than theta_t's when the step ends."""
        self._at_rest: Movement | None = None
        """What a function reads at theta_t, if that was measured."""
        self._failed_early: Exception | None = None
        """What a measurement before the candidate's failed with, to be raised where an audit's failure is expected."""
        snapshot.begin()
        ranks.begin()

    # -- begin --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Capture theta_t, and take its policy as the reference unless it is that already."""
        run, kl = self.run, self.kl
        run.open = self
        anchored = anchored_before(run, kl)
        self.auditor.resolve_budget(kl.slices or ())
        self.lr = learning_rates(self.optimizer)
        with self.clock("snapshot"):
            changed = self.snapshot.capture_weights()
        with self.clock("audit"):
            now = self._fingerprint() if anchored is not None and anchored[0] is kl else None
            self._staleness = Staleness(kl, anchored, now, changed)
        known = self._waits or not self._staleness.stale
        run.warned.of_noise = run.warned.of_noise or below_noise(self.auditor.limits, kl)  # schedules may come down
        votes = self.ranks.same(self.auditor.limits, (known, not known and self._staleness.edited))
        self.renewed = any(renewed for _, renewed in votes)
        if not all(known for known, _ in votes):
            with self.clock("audit"), self.ranks.together():
                kl.anchor()
            run.drift = None
        with self.clock("audit"):
            self._held_out.begin()
        run.modules = kl.used or run.modules
        with self.clock("snapshot"):
            self.snapshot.capture_rest(run.modules)
        if run.warned.fixed.is_due(kl):
            self._look_at_rest()

    @property
    def _waits(self) -> bool:
        """Whether staleness is decided after the inner step, when the device is waited for anyway."""
        return self._may_wait and self._staleness.is_pending

    def _fingerprint(self) -> Any:
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return self.kl.fingerprint(own)

    def _look_at_rest(self) -> None:
        """Measure theta_t by a plain function: `FixedReference` judges what it reads."""
        try:
            self._read_at_rest()
        except Exception as error:
            self._may_go_on(error)

    def _may_go_on(self, error: Exception) -> None:
        """Where errors of measurements are rejections, propose before this one is raised."""
        if self._raises or (isinstance(error, PeerFailed) and error.fatal):
            raise error
        self.ranks.announce_failure(error, fatal=False)
        self._failed_early = error

    def _read_at_rest(self) -> None:
        try:
            with self.clock("audit"):
                self._at_rest = self.auditor.audit().movement
        finally:
            self.snapshot.restore_weights()  # the function may write into them

    # -- propose ------------------------------------------------------------------------------------------------------

    def propose(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the inner step: theta~ = OptStep(theta_t, gradient)."""
        closure = loss_closure(args, kwargs)
        # A loss closure may draw its data from the random streams: rewound, it would draw the same again.
        self.rewind = self.rewind and closure is None
        self.idle = self.idle is not False and closure is None and not has_gradient(self.optimizer)
        pulled = self._pulled()
        around = nullcontext((args, kwargs)) if pulled is None else pulled.during(args, kwargs)
        with around as (args, kwargs), self._proposing():
            return self.optimizer.step(*args, **kwargs)

    def _pulled(self) -> Pulled | None:
        """What the controller has caps add to the gradient of this inner step."""
        memory, pulled = self.run.memory, None
        shares = self.run.controller.shares(memory) if self.run.controller.pull else {}
        if shares:
            turn = memory["pulls"] = memory.get("pulls", 0) + 1
            try:
                with self.clock("search"):
                    pulled = self.auditor.pulled(shares, turn)
            except Exception as error:
                self._may_go_on(error)
        self.pull = {} if pulled is None else pulled.shares
        return pulled

    @contextmanager
    def part(self) -> Iterator[None]:
        """Around a call of the inner optimizer that may move weights: in a window's body, one more part of it."""
        if not self.in_body:
            yield
            return
        self.idle = False
        with self._proposing():
            yield

    @contextmanager
    def _proposing(self) -> Iterator[None]:
        in_body, self.in_body = self.in_body, False
        try:
            with (
                self.clock("inner"),
                self.snapshot.watch_groups(),
                scaled_rates(self.optimizer, self.scale, but=self._keeping.groups()),
                inner_step(self.optimizer),
            ):
                yield
        finally:
            self.in_body = in_body

    # -- decide -------------------------------------------------------------------------------------------------------

    def decide(self) -> None:
        """Commit a feasible candidate; otherwise do what the controller says."""
        self.proposed = True
        if self._failed_early is not None:
            raise self._failed_early
        candidate = self._candidate()  # K_global and K_s on the control set
        self.run.warned.fixed.judge(self.kl, self._at_rest, candidate, self.auditor.limits)
        if candidate is None:
            outcome = Outcome(Action.UNCHANGED)
            if self.idle:
                self.run.warned.no_gradient(self.optimizer)
        else:
            if candidate.movement.is_finite:
                self.run.controller.saw(self.auditor.ratios(candidate), self.run.memory)
            if not candidate.feasible:
                with self.clock("audit"):
                    self._keeping.measure()
            outcome = self._settle(self._judge(candidate))
            if outcome.action is Action.REJECT:
                self._warn_of_stall(candidate)
        if outcome.point is not None:
            with self.clock("audit"):
                self.kl.anchor(outcome.point.audit)  # the audit that licensed it is the next reference
            self.run.drift = outcome.point.drift
        # What is in `.grad` is what the inner step was made of, unless there were several, or a loss closure.
        one_gradient = self.rewind and not self.windowed
        realised, progress = kept(outcome, candidate, self.snapshot, self.ranks, one_gradient=one_gradient)
        record = decided(self._measurements(), outcome, candidate, realised, progress, self._drift())
        with self.clock("audit"):
            record = self._held_out.noted(record)
        self.run.warned.of_decided(record, self.kl)
        self.ranks.exchange(None)  # it stands on every rank, or on none
        self.record = record

    def _candidate(self) -> Point | None:
        """Audit the weights that the inner step proposed; None if no bit of them, on any rank, is another one.

        An update that is not finite is infeasible without a forward: the control set may not touch its bad rows. An
        optimizer that only measures leaves even that to the bare run.
        """
        with self.clock("snapshot"):
            update = self.snapshot.update()
        early = self._audit_while_waiting() if self._waits else None
        if not self._moved(update):
            if early is not None and self._staleness.stale:
                self._anchor_again()
            return None
        if not math.isfinite(self.update_norm) and self.run.budget.limits_anything:
            if early is not None and self._staleness.stale:  # nothing of this step needs it; the next one takes it anew
                self._reference_is_stale, self.renewed = True, self._staleness.edited
            return self.auditor.not_finite()
        if self.kl.opaque:
            self.snapshot.keep_candidate()  # a plain function may write into the weights
        with self.clock("audit"):
            audit = early if early is not None and not self._staleness.stale else self._audit_candidate(early)
        self.auditor.start_from(self._drift() if self.auditor.limits.caps_drift else None)
        with self.clock("audit"):
            return self.auditor.candidate(audit)

    def _audit_while_waiting(self) -> Audit:
        """Audit before the update was read: the device is waited for once, when it has all figures."""
        with self.clock("audit"), self.snapshot.copied_aside():
            return self.auditor.audit(with_drift=True)

    def _audit_candidate(self, early: Audit | None) -> Audit:
        if early is not None:  # it was measured from a stale reference: somebody wrote weights since the last commit
            self.snapshot.keep_candidate()
            self.snapshot.go(0)
            self._anchor_again()
            self.snapshot.go(1)
        with self.snapshot.copied_aside():
            return self.auditor.audit(with_drift=True)  # it will probably stand

    def _anchor_again(self) -> None:
        self.kl.anchor()
        self.run.drift, self.renewed = None, self._staleness.edited

    def _moved(self, update: Update) -> bool:
        with self.clock("snapshot"):
            updates = self.ranks.exchange(update.read())
        self.update_norm = math.sqrt(sum(square for _, square in updates) / len(updates))
        return any(moved for moved, _ in updates)

    def _judge(self, candidate: Point) -> Outcome:
        if candidate.feasible:
            return Outcome(Action.COMMIT, candidate)
        self._keeping.begin()
        if not math.isfinite(self.update_norm) or (self.auditor.used_up(candidate) and self.run.controller.shrinks):
            if self.run.recorder is not None:
                self.snapshot.keep_candidate()
            return Outcome(Action.REJECT)  # no part of it is finite either; or no part of it is within a used-up path
        with self.clock("search"):
            run, rejected = self.run, self.run.progress.rejected_in_a_row

            def explain() -> str:
                self.auditor.leave()
                return str(self._why(candidate, rejected))

            return run.controller.decide(self.auditor.trial(candidate, rejected, run.memory, explain))

    def _settle(self, outcome: Outcome) -> Outcome:
        """Leave the outcome's point in the weights, or theta_t; what rounding made theta_t is a rejection."""
        if not isinstance(outcome, Outcome):
            raise TypeError(f"decide() returned {outcome!r}; return trial.accept(point) or trial.reject()")
        controller = self.run.controller
        if outcome.action is not Action.REJECT:
            committed = outcome.action is Action.COMMIT
            self.auditor.go(outcome.point, restore_state=controller.on_shrink == "restore" and not committed)
            if committed or self._keeping.moved():
                return outcome
        # Moments that have seen a gradient which is not finite would reject every later step.
        finite = self.auditor.audited[0].movement.is_finite
        with self.clock("audit"):
            self._keeping.reject(keep_state=controller.on_reject == "keep_state" and finite, rewind=self.rewind)
        return replace(outcome, action=Action.REJECT, point=None, layers={})

    def _warn_of_stall(self, candidate: Point) -> None:
        """If it was the fifth rejection in a row, or the fiftieth, say why and what helps."""
        rejected = self.run.progress.rejected_in_a_row + 1
        if used_up := self.auditor.used_up(candidate):
            self.run.warned.of_used_up(self.auditor.limits, used_up, self.run.path)
        elif is_told(rejected) and rejected > (self.run.controller.patience or 0):
            self.run.warned.of_stall(self._why(candidate, rejected))

    def _why(self, candidate: Point, rejected: int) -> Stall:
        """Put together what is known about rejections in a row; the weights are theta_t."""
        run, auditor = self.run, self.auditor
        if self.kl.opaque:
            self._read_at_rest()
            run.warned.fixed.judge(self.kl, self._at_rest, candidate, auditor.limits)
        return stall_of(run, auditor, candidate, rejected, self.update_norm, self._at_rest)

    def _drift(self) -> Movement | None:
        """Movement of the committed policy from pi_ref; measured again only if the policy changed."""
        if self.run.drift is None and self.kl.measures_drift:
            with self.clock("audit"):
                self.run.drift = self.auditor.drift()
        return self.run.drift

    # -- end ----------------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Put everything back, bit for bit."""
        self.snapshot.restore(rewind=self.rewind)

    def remember(self) -> None:
        """Keep what the next step begins with, to see whether somebody else writes weights until then."""
        run, record = self.run, self.record
        if record is not None and record.action not in (Action.REJECT, Action.UNCHANGED):
            run.warned.fixed.weights_moved()
        self.snapshot.remember(as_proposed=record is not None and record.action is Action.COMMIT)
        run.modules = self.kl.used or run.modules
        # Without an audit, a forward in a loss closure or a window may have moved buffers away from the reference.
        moved = record is not None and record.action is Action.UNCHANGED and not self.rewind
        run.anchored = None if moved or self._reference_is_stale else (self.kl, self._fingerprint(), self.kl.renewals)

    def release(self) -> None:
        """Let go of what only serves a step in progress."""
        self.snapshot.release()
        self.kl.release()

    def failed(self, error: BaseException) -> StepRecord:
        """Return the record of a step that ended in an error."""
        return failed(self._measurements(), error)

    def _measurements(self) -> Measurements:
        auditor = self.auditor
        return Measurements(
            self.run.progress.step,
            auditor.limits,
            auditor.exceeded_before,
            auditor.drift_before,
            self.pull,
            tuple(self.kl.slices or ()),
            tuple(auditor.audited[1:]),
            self.update_norm,
            self.lr,
            self.scale,
            self.renewed,
            self._keeping.count,
            self._keeping.probes,
        )
