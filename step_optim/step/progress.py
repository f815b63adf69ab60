"""What a run remembers between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from step_optim.audit.closure import KLClosure
from step_optim.budget import AutoBudget, Budget
from step_optim.controllers.base import Action, Controller
from step_optim.movement import Movement
from step_optim.path_length import PathLength
from step_optim.snapshot.snapshot import Snapshot
from step_optim.step.origin import settle_origin
from step_optim.step.radius import next_scale
from step_optim.step.stages import Stages
from step_optim.step.unread import Unread
from step_optim.step.warned import Warned
from step_optim.telemetry.alerts import STALL
from step_optim.telemetry.record import StepRecord
from step_optim.telemetry.summary import Summary

VERSION = 1
"""Of the wrapper's part of a checkpoint."""


@dataclass(frozen=True)
class Progress:
    """How far the run has come. It is replaced as a whole, so that an interrupt finds the old or the new one."""

    step: int = 0
    """Steps that are over."""
    rejected_in_a_row: int = 0
    """Those of the latest that a controller rejected."""
    summary: Summary = field(default_factory=Summary)
    last: StepRecord | None = None
    scale: float = 1.0
    """On the learning rates of the next proposal, under ``adaptive_rate``."""
    latest: tuple[str, ...] = ()
    """The constraints that bound the latest `STALL` of the rejections in a row."""

    def after(self, record: StepRecord, *, adaptive_rate: bool = False) -> Progress:
        """Count one step."""
        rejected, latest = self.rejected_in_a_row, self.latest
        if record.constraint is not None and record.action is Action.REJECT:
            rejected, latest = rejected + 1, self.bound_by(record.constraint)
        elif record.triggered or record.action is Action.COMMIT:
            rejected, latest = 0, ()
        return replace(
            self,
            step=self.step + 1,
            rejected_in_a_row=rejected,
            latest=latest,
            summary=self.summary.plus(record),
            last=record,
            scale=next_scale(self.scale, record) if adaptive_rate else self.scale,
        )

    def bound_by(self, constraint: str) -> tuple[str, ...]:
        """Return the constraints of the latest rejections, if one more is added."""
        return (*self.latest, constraint)[-STALL:]


class OpenStep(Protocol):
    """A step in progress, as those see it that add inner steps to a window."""

    def propose(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one more inner step."""

    def part(self) -> AbstractContextManager[None]:
        """Around any other call of the inner optimizer that may move weights."""


class Recorder(Protocol):
    """What keeps steps for later, as the end of a step sees it."""

    def take(self, record: StepRecord, snapshot: Snapshot, names: Callable[[], Mapping[str, int | None]]) -> None:
        """Keep a step that was decided, or do not; both of its ends are in the snapshot."""


@dataclass
class Run:
    """The state of a run.

    It is one object: a host may hand out a proxy of the optimizer (Lightning
    does), which would keep for itself what is assigned to it.
    """

    budget: Budget
    controller: Controller
    named: bool = True
    """Whether the controller was named, and is not the one that goes with budget and KL closure."""
    adaptive_rate: bool = False
    """Whether proposals are scaled by what the last ones have shown."""
    kl: KLClosure | None = None
    kl_state: Mapping[str, Any] = field(default_factory=dict)
    """Of a checkpoint that was loaded before there was a KL closure."""
    progress: Progress = field(default_factory=Progress)
    memory: dict[str, Any] = field(default_factory=dict)
    """What the controller remembers of this run; see `Trial.memory`."""
    notes: dict[str, Any] = field(default_factory=dict)
    """For the record of the step to come."""
    open: OpenStep | None = None
    """The step in progress."""
    anchored: Any = None
    """A fingerprint of the policy that is the KL closure's reference; None if that has to be taken anew."""
    renewals: int = 0
    """How often the KL closure's observations had been renewed at the latest step."""
    drift: Movement | None = None
    """Of the committed policy from pi_ref; None if it has to be measured."""
    ended: float | None = None
    """When this process ended the latest step, on its own clock."""
    warned: Warned = field(default_factory=Warned)
    """What was warned of so far."""
    modules: Sequence[nn.Module] = ()
    """Whose buffers are part of the policy."""
    recorder: Recorder | None = None
    """What keeps steps for later; None if nothing does."""
    stages: Stages | None = None
    """What ties it to a ledger, as one stage of several."""
    unread: Unread | None = None
    """Which parameters keep their whole step; None if none do."""

    def forget_unread(self) -> None:
        """Measure anew, at the next step, what the KL closure reads."""
        self.unread = None if self.unread is None else self.unread.forgotten()

    def take(self, kl: KLClosure, controller: Controller, origin: str | None) -> None:
        """Go on with a KL closure, and the controller that goes with it; see `STEPOptimizer.bind`."""
        anew = origin in ("now", "adapter_off")
        if not anew:
            kl.load_state_dict(self.kl_state or self._first_policy(kl, origin))
        settle_origin(kl, self.kl, origin)
        if self.stages is not None and self.kl_state and not anew and self.stages.resumed:
            self.stages.measured_as_before()
        elif self.stages is not None:
            self.stages.measured_from(origin)
        another = self.kl is not None and kl is not self.kl
        if anew or another:
            self.controller.forget_reference(self.memory)
        if another:
            self.forget_unread()
        if another and origin is None:
            self.warned.of_another_origin(self.budget, kl, self.drift)
        self.kl, self.kl_state, self.anchored, self.controller = kl, {}, None, controller
        self.renewals = kl.renewals
        self.warned.fixed.forget(kl)
        self.warned.of_budget(self.budget, kl)

    def _first_policy(self, kl: KLClosure, origin: str | None) -> Mapping[str, Any]:
        """What the ledger has of pi_ref, unless the closure that is bound knows it."""
        known = origin == "keep" and self.kl is not None
        return {} if self.stages is None or known else self.stages.pi_ref(kl)

    def seen(self, record: StepRecord, kl: KLClosure) -> tuple[Budget, Mapping[str, float]]:
        """Return the budget of the steps to come, and what an automatic one was fixed at by this step.

        All processes have the same pooled figures, and so the same budgets.

        Args:
            record: of this step.
            kl: what measured it. One that was given for this step alone measures other prompts than the bound one.
        """
        if not record.shows_movement or (self.kl is not None and kl is not self.kl):
            return self.budget, {}
        budget = self.budget.seen(record.candidate)
        if isinstance(budget, AutoBudget) and budget is not self.budget:
            return budget, budget.fixed
        return budget, {}

    @property
    def path(self) -> PathLength:
        """How long the path is so far, with the stages before."""
        path = self.progress.summary.path
        return path if self.stages is None else replace(path, before=self.stages.before)

    def begin(self) -> PathLength:
        """Begin a step; return the path length before it."""
        if self.stages is not None:
            self.stages.begin()
        return self.path

    def keep(self, record: StepRecord, kl: KLClosure) -> None:
        """Enter a step into the ledger, if there is one."""
        if self.stages is not None:
            summary, bound = self.progress.summary, kl if kl is self.kl else None
            self.stages.keep(record, summary.steps, summary.path, bound, self.budget)

    def without_model(self) -> Run:
        """Return what a copy of the optimizer goes on with; the KL closure holds a model, so it stays behind."""
        return Run(
            self.budget,
            self.controller,
            self.named,
            self.adaptive_rate,
            kl_state=self._kl_state(),
            progress=self.progress,
            memory=self.controller.copied(self.memory),
            recorder=self.recorder,
            stages=self.stages,
            unread=None if self.unread is None else self.unread.without_model(),
        )

    def _kl_state(self) -> dict[str, Any]:
        return dict(self.kl_state) if self.kl is None else self.kl.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapper's part of a checkpoint: plain values and tensors."""
        return {
            "version": VERSION,
            "step": self.progress.step,
            "rejected_in_a_row": self.progress.rejected_in_a_row,
            "summary": self.progress.summary.state_dict(),
            "controller": self.controller.copied(self.memory) | self.controller.state_dict(),
            "kl": self._kl_state(),
            **({"budget": budget} if (budget := self.budget.state_dict()) else {}),
            **({"scale": self.progress.scale} if self.adaptive_rate else {}),
            **({} if self.stages is None else {"stage": self.stages.name}),
            **({"unread": known} if self.unread is not None and (known := self.unread.state_dict()) else {}),
        }

    def loader(self, state: Mapping[str, Any] | None) -> Callable[[], None]:
        """Check that part (None in the checkpoint of a bare optimizer) and return what takes it over.

        Raises:
            ValueError: it cannot be read, or is of another run.
        """
        progress, kl_state, budget, unread = self.progress, self.kl_state, self.budget, self.unread
        if state is not None:
            progress, kl_state, budget, unread = _read(state, self)
        stages, stage = self.stages, None if state is None else state.get("stage")
        if stages is not None and stage not in (None, stages.name):
            progress, kl_state = Progress(scale=progress.scale), {}  # moments go on; the rest is in the ledger
        elif stages is not None and stage is None and not stages.ledger.is_first:
            kl_state = {}  # of a run that had no ledger; pi_ref is the one of the first stage
        if state is not None and self.kl is not None:
            self.kl.check_state_dict(kl_state)
            budget.check_slices(self.kl.slices)

        remembered = {} if state is None else self.controller.copied(dict(state["controller"]))

        def take_over() -> None:
            self.progress, self.kl_state, self.budget, self.anchored = progress, kl_state, budget, None
            self.unread = unread
            if state is None:
                return
            if stages is not None:
                stages.resumed = stage in (None, stages.name) and progress.step > 0
            if self.kl is not None:
                if stages is not None and stages.resumed and kl_state:
                    stages.measured_as_before()
                self.kl.load_state_dict(kl_state)
                self.kl_state = {}
            self.controller.load_state_dict(dict(state["controller"]))
            own = self.controller.state_dict()
            self.memory = {name: value for name, value in remembered.items() if name not in own}
            if self.named and not self.controller.follows_gradients:
                self.memory.pop("cuts", None)  # of `Steer`, and as large as the weights

        return take_over


def _read(state: Mapping[str, Any], run: Run) -> tuple[Progress, Mapping[str, Any], Budget, Unread | None]:
    """Read how far a run was, its KL closure's part of the checkpoint, its budget, and what of it is unread."""
    try:
        version, kl_state = _count(state["version"]), {str(name): value for name, value in state["kl"].items()}
        summary = Summary({str(name): float(value) for name, value in state["summary"].items()})
        summary.figures()
        progress = Progress(
            _count(state["step"]), _count(state["rejected_in_a_row"]), summary, scale=_scale(state.get("scale", 1.0))
        )
        run.controller.check_state_dict(dict(state["controller"]))
        budget = run.budget.loaded(state.get("budget", {}))
        unread = None if run.unread is None else run.unread.loaded(state.get("unread"))
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"the checkpoint's entry 'step_optim' is damaged ({type(error).__name__}: {error}); without that entry the "
            "rest loads as a bare optimizer's"
        ) from error
    if version != VERSION:
        raise ValueError(f"the checkpoint is of version {version}, this step_optim reads {VERSION}; upgrade it")
    return progress, kl_state, budget, unread


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r:.60} is not a count")
    return value


def _scale(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{value!r:.60} is no scale")
    return float(value)
