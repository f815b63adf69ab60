"""Going back to a kept step between two steps: measure there, and leave no trace."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor
from torch.optim import Optimizer

from step_optim.audit.closure import Audit, KLClosure, Unbound
from step_optim.budget import Budget
from step_optim.controllers.base import Point, Trial
from step_optim.flight.kept import KeptStep
from step_optim.flight.recorder import FlightRecorder
from step_optim.host.ranks import Ranks
from step_optim.host.undo import depth, finish
from step_optim.limits import Limits, Verdict
from step_optim.movement import Movement
from step_optim.path_length import PathLength
from step_optim.snapshot.path import Path
from step_optim.snapshot.snapshot import Snapshot
from step_optim.snapshot.weights import square
from step_optim.step.auditor import Auditor
from step_optim.step.fixed_reference import is_movement
from step_optim.step.progress import Run

TOLERANCE = 0.01
"""Part of a KL by which two measurements of one candidate may differ before it is warned of: `Interpolate` searches
alpha to 0.01."""


@dataclass(frozen=True)
class Site:
    """Where a kept step is measured again: an optimizer between two steps."""

    run: Run
    """Has the KL closure, and the recorder."""
    optimizer: Optimizer
    """The inner one."""
    snapshot: Snapshot
    """Captures and moves the weights."""
    ranks: Ranks
    """Who does it together."""


class Visit:
    """One measurement at a kept step; afterwards all is bit for bit as before, whatever happens in it.

    Nest two of them, as with `Atomic`: the outer one ends what an interrupt in
    the inner one's exit has left unfinished. All processes make it together.
    The KL closure's reference is the policy at the kept theta_t during the
    visit; the next step takes its own anew. pi_ref stays.

    Args:
        site: the optimizer.
        kept: the step; None for the latest that the optimizer's own recorder has. The first process's is taken.
    """

    kept: KeptStep
    """The kept step."""
    previous: list[Tensor]
    """theta_t, each tensor on its parameter's device."""
    candidate: list[Tensor]
    """The candidate, likewise."""
    squares: list[float]
    """‖candidate - theta_t‖² of each."""
    trial: Trial
    """Measures at any weights; its `candidate` is the kept one, measured again."""

    def __init__(self, site: Site, kept: KeptStep | None) -> None:
        if kept is not None and not isinstance(kept, KeptStep):
            raise TypeError(
                f"kept={kept!r:.60} is no KeptStep; give one of read_flight(folder), or None for the latest"
            )
        if site.run.kl is None:
            Unbound().audit()  # raises: nothing would be measured
        self._site, self._given = site, kept
        self._depth, self._grad, self._left = depth(), torch.is_grad_enabled(), False
        self._began = False
        """Whether what the snapshot would restore is of this visit, and not of the latest step."""
        self._forgets_origin = False

    @property
    def _kl(self) -> KLClosure:
        assert self._site.run.kl is not None
        return self._site.run.kl

    def __enter__(self) -> None:
        """Nothing has happened yet."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put everything back, unless that is done."""
        try:
            finish(self._depth)
        finally:
            torch.set_grad_enabled(self._grad)
            if not self._left:
                self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        site = self._site
        if self._began:
            site.snapshot.restore()
        if self._forgets_origin:
            self._kl.forget_origin()
        site.snapshot.release()
        self._kl.release()
        self._left = True
        if error is not None:
            site.ranks.announce_failure(error, fatal=True)

    # -- begin --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Go to the kept step, take theta_t's policy as the reference, and measure the candidate."""
        site, kl = self._site, self._kl
        site.ranks.begin()
        site.snapshot.begin()
        self._began = True
        found = site.ranks.agree(self._loaded())
        assert found is not None  # the first process has it
        self.kept, *ends = found
        site.run.anchored = None  # from here on the reference may be another policy, and the snapshot's weights too
        site.snapshot.capture_weights()
        site.snapshot.capture_rest(site.run.modules or kl.modules())
        self._auditor = Auditor(kl, self._budget(), PathLength(), self.kept.step, site.snapshot, site.ranks)
        places = site.snapshot.previous
        self._check_fit(ends[0], places)
        self.previous, self.candidate = ([v.to(p.device) for v, p in zip(end, places, strict=True)] for end in ends)
        self.squares = [float(square(b, a)) for a, b in zip(self.previous, self.candidate, strict=True)]
        self._auditor.resolve_budget(kl.slices or ())
        self._anchor()
        self._auditor.start_from(self._auditor.drift() if self.limits.caps_drift else None)
        self.trial = self._auditor.trial(self._candidate(), 0, {}, str)
        check_same(self.kept, self.trial.candidate)

    def _loaded(self) -> tuple[KeptStep, list[Tensor], list[Tensor]] | None:
        """Read the step; only the first process does, since the folder may be there alone."""
        if not self._site.ranks.first:
            return None
        recorder, kept = self._site.run.recorder, self._given
        if kept is None:
            if not isinstance(recorder, FlightRecorder):
                raise ValueError("kept=None is the latest step of recorder=, and there is none; give a KeptStep")
            kept = recorder.latest
        if kept is None:
            raise ValueError(f"kept=None is the latest kept step, and {recorder!r} has kept none yet; give a KeptStep")
        return kept, *kept.ends

    def _check_fit(self, tensors: Sequence[Tensor], places: Sequence[Tensor]) -> None:
        """Refuse a step of other parameters."""
        named = {place: name for name, place in reversed([*self.kept.names.items()]) if place is not None}
        here = {name: place for name, place in self._auditor.names().items() if place is not None}
        for i, (kept, own) in enumerate(zip(tensors, places, strict=False)):
            name = named.get(i, f"tensor {i}")
            kinds = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (kept, own)]
            if kinds[0] != kinds[1]:
                raise self._misfit(f"{name} is {kinds[0]} there, and {kinds[1]} here")
            if here.get(name, i) != i:
                raise self._misfit(f"{name} is tensor {i} there, and tensor {here[name]} here")
        if len(tensors) != len(places):
            raise self._misfit(f"it has {len(tensors)} tensors, and the optimizer has {len(places)}")

    def _misfit(self, what: str) -> ValueError:
        return ValueError(
            f"{self.kept.path} does not fit the optimizer's parameters: {what}; build the model as it was"
        )

    def _budget(self) -> Budget:
        """The budgets that were in force at the step.

        Raises:
            ValueError: they are for slices that the KL closure does not have, or for a drift that it cannot tell.
        """
        limits, kl = self.kept.record.budget, self._kl
        if limits.caps_drift and not kl.has_origin:
            raise ValueError(
                f"step {self.kept.step} had a cap on the drift, and {kl!r} knows no pi_ref yet: take a step first, or "
                "load the run's checkpoint"
            )
        budget = _budget_of(limits)
        try:
            budget.check_slices(kl.slices)
        except ValueError as error:
            raise ValueError(
                f"step {self.kept.step} was made under other budgets than {kl!r} can judge: {error}"
            ) from error
        return budget

    def _anchor(self) -> None:
        """Take the policy of theta_t as the reference; it is no pi_ref."""
        site, kl = self._site, self._kl
        self._forgets_origin = not kl.has_origin
        site.snapshot.write(self.previous)
        with site.ranks.together():
            kl.anchor()
        if kl.opaque:
            self._check_reference()

    def _check_reference(self) -> None:
        """Refuse a function that measures from another policy than theta_t's: its reference is its own."""
        reading, moved = self._auditor.audit().movement.largest, self.kept.record.candidate
        if math.isnan(reading) or is_movement(reading, moved.largest if moved.is_finite else 0.0):
            raise ValueError(
                f"{self._kl!r} reads {reading:.3g} at theta_t of step {self.kept.step}, where the movement is 0: it "
                "measures from another policy. Give its own reference the weights of KeptStep.previous first, or use "
                "PolicyKL or TokenKL, which take it by themselves"
            )

    def _candidate(self) -> Point:
        self._site.snapshot.write(self.candidate)
        if not all(map(math.isfinite, self.squares)):
            return self._auditor.not_finite()
        return self._auditor.candidate(self._auditor.audit())

    # -- measure ------------------------------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        """The budgets of the kept step."""
        return self._auditor.limits

    @property
    def audits(self) -> int:
        """How many points were measured so far, the candidate among them."""
        return len(self._auditor.audited)

    def at(self, alpha: float) -> Point:
        """Measure theta_t + alpha (candidate - theta_t), on the way that the step went; as `Snapshot.go` writes it.

        What kept its whole step is at the candidate there, too.
        """
        way, spared = self.kept.way, set(self.kept.spared)
        squares = [0.0 if i in spared else square for i, square in enumerate(self.squares)]
        parts = [alpha] * len(self.previous) if way is None else Path(way, squares).parts(alpha)
        parts = [1.0 if i in spared else part for i, part in enumerate(parts)]
        ends = zip(self.previous, self.candidate, parts, strict=True)
        return self.measured([a if part == 0 else b if part == 1 else torch.lerp(a, b, part) for a, b, part in ends])

    def measured(self, values: Sequence[Tensor]) -> Point:
        """Measure any weights; weights whose update is not finite read NaN, and are not measured."""
        wrong = [i for i, square in enumerate(self.squares) if not math.isfinite(square)]
        if any(values[i] is not self.previous[i] for i in wrong):
            unknown = Movement.everywhere(math.nan, self.trial.candidate.movement.slices)
            return Point(Audit(unknown), Verdict({}, finite=False))
        return self.trial.at_weights(values)

    def end(self) -> None:
        """All processes have come so far: it stands on every one, or on none."""
        self._site.ranks.exchange(None)


def check_same(kept: KeptStep, now: Point) -> None:
    """Warn if the candidate reads otherwise than at the step: what is measured would not go with the record."""
    then = kept.record
    for what, before, after in (("", then.candidate, now.movement), ("a drift of ", then.candidate_drift, now.drift)):
        if before is None or after is None or not before.is_finite:
            continue
        if not math.isclose(after.mean, before.mean, rel_tol=TOLERANCE):
            warnings.warn(
                f"the candidate of step {kept.step} reads {what}{after.mean:.4g} nats per token now, and read "
                f"{before.mean:.4g} then, so what is measured does not go with the record: the KL closure "
                "measures other prompts, or from another pi_ref, or buffers are others by now (BatchNorm's, which no "
                "kept step has)",
                stacklevel=4,
            )


def _budget_of(limits: Limits) -> Budget:
    """The budgets that were in force; those on the mean and the slices have what a cap on the path had left."""
    return Budget(
        limits.mean,
        dict(limits.slices) or None,
        limits.drift,
        dict(limits.drift_slices) or None,
        prompt=limits.prompt,
        token=limits.token,
        confidence=limits.confidence,
    )
