"""One step in progress: theta_t is safe, anything can be tried, and it ends at one audited point."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet, WeakValueDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from step_optim.audit.closure import Audit, FunctionKL, KLClosure
from step_optim.audit.fingerprint import Fingerprint
from step_optim.budget import Budget, Limits, Verdict
from step_optim.controllers.base import Action, Outcome, Point, Trial
from step_optim.host.ranks import Ranks
from step_optim.host.rng import RNGState
from step_optim.host.undo import uninterrupted
from step_optim.isolation.eval_mode import isolated
from step_optim.movement import Movement
from step_optim.snapshot.state import OptimizerState
from step_optim.snapshot.tensors import any_of
from step_optim.snapshot.weights import Update, Weights
from step_optim.step.line import Line, loss_closure
from step_optim.step.rounding import Rounding
from step_optim.telemetry.record import StepRecord, TrialRecord


@dataclass
class Parts:
    """What a step works with, and the next one after it: buffers are allocated once."""

    optimizer: Optimizer
    """The inner optimizer."""
    weights: Weights
    state: OptimizerState
    line: Line
    """How a step is shrunk."""
    ranks: Ranks
    """Who has to agree."""


class Transaction:
    """Captures theta_t, measures points, and leaves one of them, or theta_t, behind.

    Args:
        parts: what lives as long as the optimizer.
        kl: measures movement.
        budget: resolved at ``step``.
        step: the step index.
        patient: whether it may turn out late, when `candidate` waits for the
            device anyway, that the reference was not theta_t's policy. Not
            where a forward inside the step may move buffers.
    """

    def __init__(self, parts: Parts, kl: KLClosure, budget: Budget, step: int, *, patient: bool = False) -> None:
        self.optimizer, self.weights, self.state = parts.optimizer, parts.weights, parts.state
        self.line, self.ranks = parts.line, parts.ranks
        self.kl, self.budget, self.step = kl, budget, step
        self.limits = Limits()
        self.seconds = {"inner": 0.0, "snapshot": 0.0, "audit": 0.0, "search": 0.0}
        self.trials: list[TrialRecord] = []
        self.lr: tuple[float, ...] = ()
        self.update_norm = 0.0
        self.rewind = True
        """Whether a rollback rewinds the random streams."""
        self.proposed = self.over = False
        """Whether there is a candidate; whether the step has ended, one way or the other."""
        self.record: StepRecord | None = None
        """What was decided. From here on the step stands."""
        self._measured: WeakSet[Point] = WeakSet()  # the policies of discarded trials need not stay in memory
        self._known: WeakValueDictionary[tuple[int, ...], Point] = WeakValueDictionary()
        """Audited points by the digest of their weights, in every process."""
        self._infeasible: dict[tuple[int, ...], Point] = {}
        """Those that will not be committed, without their policies."""
        self._rounding: Rounding | None = None
        self._here: Point | None = None
        self._rng: RNGState | None = None
        self._patient = patient
        self._doubt: Tensor | None = None
        """Whether the reference is another policy, if that is still being computed."""
        self.anchored_again = False
        """Whether the reference turned out not to be the policy of theta_t, and was taken anew in the middle."""
        self.renewed = False
        """Whether somebody else has written weights since the last step."""
        self._edited: Callable[[], bool] = lambda: False
        """Find that out."""
        self.in_body = False
        """Whether the body of a window runs."""
        self.idle: bool | None = None
        """Whether all inner steps so far had neither a gradient nor a loss closure to make one; None before the first.
        """
        self.still: Movement | None = None
        """What the KL closure reads at theta_t, if that was measured."""
        self.late: Exception | None = None
        """What that failed with, to be raised where an audit's failure is expected."""
        self.ranks.begin()

    def begin(self, anchored: Any) -> bool:
        """Take theta_t. True if the KL closure's reference is its policy, as far as can be told without waiting.

        Args:
            anchored: `fingerprint` of the policy that is the reference; None if there is none.
        """
        self.limits = self.budget.at(self.step, self.kl.slices or ())
        self.lr = tuple(float(group["lr"]) for group in self.optimizer.param_groups if group.get("lr") is not None)
        with self.clock("snapshot"):
            changed = self.weights.capture()
        if anchored is None:
            return False
        then, now, own = anchored[1], None, anchored[0] is self.kl
        with self.clock("audit"):
            if own:
                now = self.fingerprint()[1]
            stale = any_of([changed, not own or _differ(then, now)])
            self._edited = lambda: bool(any_of([changed, own and _weights_differ(then, now)]))
        if isinstance(stale, Tensor) and self._patient and self.kl.takes_any_weights and self.ranks.size == 1:
            self._doubt = stale
            return True
        self.renewed = bool(stale) and self._edited()
        return not bool(stale)

    def capture_state(self, modules: Iterable[nn.Module]) -> None:
        """Take all else: the optimizer's state, gradients, random streams, the buffers of the policy's modules."""
        with self.clock("snapshot"):
            self.state.capture(b for module in modules for b in module._buffers.values() if b is not None)
            self.line.mark()
            self._rng = RNGState.capture()  # last: `restore` takes it for the sign that there is something to restore

    def fingerprint(self) -> Any:
        """What tells whether the KL closure's reference is still the policy of these weights."""
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return self.kl, self.kl.fingerprint(own)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the time that the body takes to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    def propose(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run the inner step: theta~ = OptStep(theta_t, gradient)."""
        closure = loss_closure(args, kwargs)
        self.rewind = self.rewind and closure is None
        self.idle = self.idle is not False and closure is None and not self._has_gradient()
        with self._proposing():
            return self.line.propose(args, kwargs)

    @contextmanager
    def _proposing(self) -> Iterator[None]:
        in_body, self.in_body = self.in_body, False
        try:
            with self.clock("inner"), self.state.watch_groups():
                yield
        finally:
            self.in_body = in_body

    def _has_gradient(self) -> bool:
        return any(p.grad is not None for group in self.optimizer.param_groups for p in group["params"])

    @contextmanager
    def part(self) -> Iterator[None]:
        """Around a call of the inner optimizer that may move weights: in a window's body, one more part of it."""
        if not self.in_body:
            yield
            return
        self.idle = False
        with self._proposing(), self.line.proposing():
            yield

    def go_back(self) -> None:
        """Leave the candidate for theta_t in the middle of a decision that ends in an error."""
        self.line.go(0)
        self._here = None

    def look(self) -> Movement:
        """Measure theta_t, where the weights are, by a plain function: its movement should be 0."""
        try:
            with self.clock("audit"):
                self.still = self._audit().movement
        finally:
            self.weights.restore()  # the function may write into them
        return self.still

    def candidate(self) -> Point | None:
        """Audit the weights that the inner step proposed; None if no bit of them, on any rank, is another one.

        An update that is not finite is infeasible without a forward: the
        control set may not touch its bad rows. An optimizer that only measures
        leaves even that to the bare run.
        """
        with self.clock("snapshot"):
            update = self.weights.update()
        if self._doubt is not None:  # the device is waited for once, when it has all figures
            with self.clock("audit"), self.weights.copied_aside():
                audit = self._audit(drift=True)
        if not self._moved(update):
            if self._is_stale():
                self._anchor_again()
            return None
        if not math.isfinite(self.update_norm) and self.budget.limits_anything:
            return self._measure(Point(Audit(self._everywhere(math.nan)), Verdict({}, finite=False), alpha=1.0))
        if isinstance(self.kl, FunctionKL):
            self.weights.keep_candidate()  # a plain function may write into them
        with self.clock("audit"):
            if self._doubt is None or self._is_stale():
                audit = self._audit_candidate()
            if self.kl.slices is None:  # a plain function says what its slices are by measuring them
                self.budget.check_slices(audit.movement.slices)
                self.limits = self.budget.at(self.step, audit.movement.slices)
            return self._point(audit, alpha=1.0)

    def _moved(self, update: Update) -> bool:
        with self.clock("snapshot"):
            updates = self.ranks.exchange(update.read())
        self.update_norm = math.sqrt(sum(square for _, square in updates) / len(updates))
        return any(moved for moved, _ in updates)

    def _is_stale(self) -> bool:
        return self._doubt is not None and bool(self._doubt)

    def _audit_candidate(self) -> Audit:
        if self._is_stale():  # somebody wrote weights since the last commit
            self.line.keep_candidate()
            self.line.go(0)
            self._anchor_again()
            self.line.go(1)
        with self.weights.copied_aside():
            return self._audit(drift=True)  # it will probably stand

    def _anchor_again(self) -> None:
        self.kl.anchor()
        self.anchored_again, self.renewed = True, self._edited()

    def _audit(self, *, drift: bool = False) -> Audit:
        kl = self.kl
        isolation = nullcontext() if kl.isolates else isolated(kl.modules())
        with self.state.watch_groups(), isolation:
            with self.ranks.together():
                audit = kl.audit_with_drift() if drift or self._caps_drift else kl.audit()
            return self._pooled(audit)

    @property
    def _caps_drift(self) -> bool:
        return self.limits.reference < math.inf

    def _pooled(self, audit: Audit) -> Audit:
        return replace(audit, movement=Movement.pooled(self.ranks.exchange(audit.movement)))

    def drift(self, audit: Audit | None = None) -> Movement | None:
        """Movement of an audited policy, or of the reference, from pi_ref, over all ranks."""
        drift = self.kl.drift(audit)
        return None if drift is None else Movement.pooled(self.ranks.exchange(drift))

    def _point(self, audit: Audit, **where: Any) -> Point:
        drift = self.drift(audit) if self._caps_drift or audit.drift is not None else None
        verdict = self.limits.judge(audit.movement, drift if self._caps_drift else None)
        return self._measure(Point(audit, verdict, drift=drift, **where))

    def _measure(self, point: Point) -> Point:
        self.trials.append(TrialRecord(point.alpha, point.movement, point.feasible))
        return self._taken(point)

    def _taken(self, point: Point) -> Point:
        # A plain function may have written weights: what is committed are the weights that it was given.
        self._here = None if isinstance(self.kl, FunctionKL) else point
        self._measured.add(point)
        return point

    def trial(
        self, candidate: Point, rejected_in_a_row: int, memory: dict[str, Any], explain: Callable[[], str]
    ) -> Trial:
        """What a controller is given."""
        self.line.keep_candidate()
        self._candidate = candidate
        if self._here is None:
            self.weights.go(1)  # a plain function may have written into them
        bits = tuple(self.ranks.exchange(self.weights.digest()))
        self._known[bits], self._infeasible[bits] = candidate, candidate
        return Trial(
            candidate,
            self.limits,
            rejected_in_a_row,
            self.kl,
            self.weights,
            self._at,
            self._at_weights,
            self._distill,
            self.ranks.agree,
            memory,
            explain,
            self._realised if self.weights.is_coarse and self.line.is_lerp else None,
        )

    @property
    def rounded(self) -> bool:
        """Whether a search asked what rounding makes of smaller steps."""
        return self._rounding is not None

    def _realised(self, alphas: Sequence[float]) -> list[float]:
        """Which part of the update rounding leaves of each of these alphas, about."""
        if self._rounding is None:
            self._rounding = Rounding(self.weights)
        return self._rounding.realised(alphas, self.ranks)

    def _at(self, alpha: float) -> Point:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must lie between 0 (previous weights) and 1 (candidate)")
        self.line.go(alpha)
        return self._audited_once(alpha=float(alpha))

    def _at_weights(self, values: Sequence[Tensor]) -> Point:
        values = self._write(values)
        return self._audited_once(weights=values)

    def _audited_once(self, **where: Any) -> Point:
        """Audit these weights, unless that was done in this step: rounding makes one point of many."""
        bits = tuple(self.ranks.exchange(self.weights.digest()))
        known = self._known.get(bits) or (self._infeasible.get(bits) if where.get("alpha") is not None else None)
        if known is None:
            point = self._point(self._audit(), **where)
        else:
            point = self._taken(replace(known, again=True, **({"alpha": None, "weights": None} | where)))
        self._known[bits] = point
        if not point.feasible:
            self._infeasible[bits] = replace(point, audit=replace(point.audit, policy=None))
        return point

    def _write(self, values: Sequence[Tensor]) -> list[Tensor]:
        values = [value.detach().clone() for value in values]
        self.line.write(values)
        return values

    def _distill(self, values: Sequence[Tensor], strength: Tensor) -> tuple[Point, float, list[Tensor]]:
        values = self._write(values)
        kl: Any = self.kl
        audit, loss, gradients = kl.distill(self._candidate.audit, strength, self.weights.parameters)
        gradients = self.ranks.average(gradients, weight=kl.prompts)
        return self._point(self._pooled(audit), weights=values), self.ranks.agree(loss), gradients

    def settle(self, outcome: Outcome, on_reject: str, on_shrink: str) -> Outcome:
        """Leave the outcome's point in the weights, or theta_t; what rounding made theta_t is a rejection."""
        if not isinstance(outcome, Outcome):
            raise TypeError(f"decide() returned {outcome!r}; return trial.accept(point) or trial.reject()")
        if outcome.action is not Action.REJECT:
            self._go(outcome.point, restoring=on_shrink == "restore" and outcome.action is not Action.COMMIT)
            if outcome.action is Action.COMMIT or any(self.ranks.exchange(self.weights.update().read()[0])):
                return outcome
        # Moments that have seen a gradient which is not finite would reject every later step.
        self.restore(keep_state=on_reject == "keep_state" and self.trials[0].movement.is_finite)
        return replace(outcome, action=Action.REJECT, point=None)

    def _go(self, point: Point | None, *, restoring: bool = False) -> None:
        if point is None or point not in self._measured or not point.feasible:
            raise RuntimeError(
                f"the controller accepted {point}, which is not a feasible point that this trial measured"
            )
        if restoring:  # copies of the weights are part of that state: they are moved along once more
            self.state.restore_optimizer()
        elif point is self._here:
            return
        if point.alpha is not None:
            self.line.go(point.alpha)
        else:
            assert point.weights is not None
            self.line.write(point.weights)

    def describe(self, outcome: Outcome, candidate: Point | None, drift: Movement | None) -> StepRecord:
        """Put what was decided together with what was measured on the way."""
        accepted = outcome.point
        proposed = self._everywhere(0.0) if candidate is None else candidate.movement
        return StepRecord(
            **self._measurements(),
            action=outcome.action,
            candidate=proposed,
            accepted=proposed.still() if accepted is None else accepted.movement,
            triggered=candidate is not None and not candidate.feasible,
            bound=None if candidate is None else candidate.verdict.binding,
            alpha=None if candidate is None else 0.0 if accepted is None else accepted.alpha,
            alpha_realised=None if candidate is None else self._realised_alpha(accepted),
            stalled=outcome.stalled,
            projection=outcome.projection,
            reference_drift=drift,
            error=None if proposed.is_finite else self._not_finite(proposed),
            success=proposed.is_finite,
        )

    def stand(self, record: StepRecord) -> None:
        """Let the decision stand, on every rank or on none."""
        self.ranks.exchange(None)
        self.record = record

    def release(self) -> None:
        """Let go of what the next step does not need."""
        self.state.release()

    def failed(self, error: BaseException) -> StepRecord:
        """Return the record of a step that ended in an error."""
        return StepRecord(
            **self._measurements(),
            action=Action.REJECT,
            candidate=self._everywhere(math.nan),
            accepted=self._everywhere(0.0),
            error=f"{type(error).__name__}: {error}",
            success=False,
        )

    def _measurements(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "budget": self.limits,
            "trials": tuple(self.trials[1:]),
            "update_norm": self.update_norm,
            "lr": self.lr,
            "scale": self.line.scale,
            "reference_renewed": self.renewed,
        }

    def _everywhere(self, kl: float) -> Movement:
        return Movement(kl, dict.fromkeys(self.kl.slices or (), kl))

    def _not_finite(self, candidate: Movement) -> str:
        if not math.isfinite(self.update_norm):
            return f"the update is not finite (norm {self.update_norm})"
        return f"the candidate's KL is not finite: mean {candidate.mean}, worst {candidate.worst}"

    def _realised_alpha(self, point: Point | None) -> float:
        """Which part of the update stands, after rounding."""
        if point is None:
            return 0.0
        if point.alpha == 1:
            return 1.0
        along, length = map(sum, zip(*self.ranks.exchange(self.weights.alignment()), strict=True))
        return along / length if length > 0 else math.nan

    def restore(self, *, keep_state: bool = False) -> None:
        """Put everything back, bit for bit."""
        rng = self._rng
        if rng is None:  # nothing has moved yet
            return

        def undo() -> None:
            self.weights.restore()
            if keep_state:
                self.line.go_back()
            self.state.restore(keep_state=keep_state)
            # A loss closure may draw its data from these streams: rewound, it would draw the same again.
            if self.rewind:
                rng.restore()

        uninterrupted(undo)


def _differ(then: Any, now: Any) -> bool | Tensor:
    """Whether two fingerprints of one KL closure are not of one policy; a tensor if only an accelerator can tell."""
    return then.differs(now) if isinstance(then, Fingerprint) else bool(then != now)


def _weights_differ(then: Any, now: Any) -> bool | Tensor:
    """The same of the weights alone, without buffers, which training forwards write."""
    return then.weights_differ(now) if isinstance(then, Fingerprint) else bool(then != now)
