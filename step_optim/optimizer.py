"""STEPOptimizer: every optimizer step is a transaction on the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from step_optim.audit.closure import KLClosure, Unbound
from step_optim.budget import Bound, Budget
from step_optim.controllers.base import Action, Controller
from step_optim.flight.attribute import attributed
from step_optim.flight.attribution import Attribution
from step_optim.flight.kept import KeptStep
from step_optim.flight.parts import By
from step_optim.flight.recorder import FlightRecorder, recorder_of
from step_optim.flight.remeasure import remeasured
from step_optim.flight.visit import Site
from step_optim.host.ranks import WORLD, Ranks
from step_optim.host.wrapper import hooked
from step_optim.snapshot.known import ParamLike, known_copies
from step_optim.snapshot.snapshot import Snapshot
from step_optim.step.adjustable import AdjustableOptimizer
from step_optim.step.atomic import Atomic
from step_optim.step.checks import check_controller, check_inner, check_line, check_rates, default_controller
from step_optim.step.progress import Run
from step_optim.step.proposal import loss_closure
from step_optim.step.stages import Stages
from step_optim.step.step import Step
from step_optim.step.unread import unread_of
from step_optim.telemetry.ledger import Ledger
from step_optim.telemetry.log import open_log, picklable
from step_optim.telemetry.record import StepRecord
from step_optim.telemetry.sinks import Sink


class STEPOptimizer(AdjustableOptimizer):
    """A post-optimizer trust region around any torch optimizer.

    The inner optimizer proposes, an audit measures what the proposal did to
    the policy on a control set, and the proposal, a smaller version of it, or
    nothing is committed. Nothing in between is ever left behind. With an
    infinite budget a wrapped run is bit-identical to the bare one.

    Args:
        optimizer: any torch optimizer; it stays reachable as ``.optimizer``.
        kl: the KL closure: `TokenKL`, `PolicyKL`, or any function without
            arguments that returns the movement of the current weights from
            the weights before the step: it has to take that reference before
            every ``step()``, as in the example; one that measures from a fixed
            policy is warned of. It may come later, through `bind`.
        budget: a `Budget`, or a number for ``Budget(mean=number)``.
        controller: `Interpolate`, `Steer`, `Gate`, `Project`, or your own `Controller`. By default `Steer` if the
            budget caps the drift and the KL closure has a pool, and `Interpolate` otherwise.
        log: a path for JSON lines, a tracker (W&B, trackio, MLflow, TensorBoard, accelerate, ...; see
            `telemetry.Tracker`), a callable(dict, step), or a list of these.
        ledger: what stages of training share, so that caps on path and drift span them: `Ledger`.
        on_error: what an exception in the audit does, once the weights are
            restored: ``"raise"`` it, or ``"reject"`` the step and record it.
        snapshot: where the copies are kept that a rollback needs (weights,
            moments, and in the step gradients): ``"device"``, beside them; or
            ``"cpu"``, in pinned host memory, for a full fine-tuning that would
            not fit otherwise. Every step then sends them over the bus.
        adaptive_rate: whether to propose at a learning rate that the last proposals
            have shown to be within the budget: a multiple <= 1 of the one that
            is set, which `radius.next_scale` adapts. For budgets that bind on
            most steps; it also leads a `Gate` out of rejecting for ever. Where
            all steps were over budget it halved the triggers at no visible loss
            of reward, and after shocks it gained some (examples/study/REPORT.md).
        warm_start: the former name of ``adaptive_rate``.
        param_like: where the optimizer keeps copies of the weights (keys of
            ``state[parameter]``, or a function of the inner optimizer that lists
            (copy, parameter) pairs): interpolation moves them along. By
            default those of optimizers that are known to have some;
            `step_optim.testing.check_optimizer` tells about any other.
        process_group: who decides together under torch.distributed:
            ``"world"``, a ProcessGroup, or None if this process decides alone.
            A log that is a path is written by the first of them.
        recorder: keeps steps on disk, to measure them again and to take them apart: a `FlightRecorder`, or the path of
            its folder. None keeps none, and costs nothing.
        keep: what keeps its whole step where the policy's is shrunk, led back or rolled back. ``"unread"``: all that
            the KL closure does not read (a critic of its own, a value head), weights and optimizer state. It is
            measured in the first step over budget, by a gradient and a few audits, on these observations: where other
            ones would call more of the policy, name the parameters, ``critic.parameters()``. They are refused if they
            are read. None: nothing does.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a budget for unknown slices; parameters that the KL
            closure's model does not have; `Project` over a closure without
            logits; ``differentiable=True`` inside; an optimizer that steps in
            the backward pass, or whose weights cannot be interpolated;
            ``keep=`` over one whose state belongs to all parameters together.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> before = torch.zeros(2)
    >>> optimizer = STEPOptimizer(
    ...     torch.optim.SGD([weight], lr=1.0),
    ...     kl=lambda: ((weight - before) ** 2).sum(),
    ...     budget=0.25,
    ... )
    >>> for gradient in (-1.0, -2.0):
    ...     weight.grad = torch.tensor([gradient, 0.0])
    ...     _ = before.copy_(weight.detach())  # the function's reference: the weights before this step
    ...     optimizer.step()
    ...     print(optimizer.last.action, round(optimizer.last.alpha, 2), round(weight[0].item(), 2))
    shrink 0.5 0.5
    shrink 0.25 1.0
    """

    def __init__(
        self,
        optimizer: Optimizer,
        kl: KLClosure | Callable[[], Any] | None = None,
        *,
        budget: Budget | Bound,
        controller: Controller | None = None,
        log: str | Path | Callable[..., Any] | Any = None,
        ledger: Ledger | None = None,
        on_error: str = "raise",
        snapshot: str = "device",
        adaptive_rate: bool = False,
        warm_start: bool | None = None,
        param_like: ParamLike | None = None,
        process_group: Any = WORLD,
        recorder: FlightRecorder | str | Path | None = None,
        keep: str | Iterable[Tensor] | None = None,
    ) -> None:
        check_inner(optimizer)
        if on_error not in ("raise", "reject"):
            raise ValueError(f"on_error={on_error!r} is unknown; use 'raise' or 'reject'")
        if snapshot not in ("device", "cpu"):
            raise ValueError(f"snapshot={snapshot!r} is unknown; use 'device' or 'cpu'")
        budget, named = Budget.of(budget), controller is not None
        controller = check_controller(default_controller(budget, None, optimizer) if controller is None else controller)
        check_line(optimizer, controller, budget)
        if adaptive_rate and warm_start is False:
            raise ValueError("adaptive_rate=True and warm_start=False contradict each other; give adaptive_rate alone")
        adaptive_rate = adaptive_rate or bool(warm_start)
        if adaptive_rate:
            check_rates(optimizer)
        unread = unread_of(keep, optimizer)
        run = Run(
            budget, controller, named, adaptive_rate, recorder=recorder_of(recorder, optimizer, budget), unread=unread
        )
        super().__init__(optimizer, run, Ranks(process_group))
        self._on_error, self._log = on_error, log
        self._snapshot_on = snapshot
        self._param_like = known_copies(optimizer) if param_like is None else param_like
        self._snapshot, self._sink = self._new_snapshot(), self._open_log()
        self._run.stages = None if ledger is None else Stages(ledger, self._ranks)
        if kl is not None:
            self.bind(kl)

    def _new_snapshot(self) -> Snapshot:
        """Make what captures and moves the weights; nothing of it is part of a checkpoint."""
        return Snapshot(self._inner, host=self._snapshot_on == "cpu", param_like=self._param_like)

    def _open_log(self) -> Sink:
        return open_log(self._log, self.describe, lambda: self._ranks.first)

    @hooked
    def step(self, *args: Any, kl: KLClosure | Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Propose, audit, decide: the paper's Algorithm 1.

        Args:
            *args: torch's loss closure; it goes to the inner optimizer
                untouched, by position or as ``closure=``. A `KLClosure` in its
                place is taken as ``kl``.
            kl: the KL closure of this step only.
            **kwargs: further arguments of the inner step.

        Returns:
            What the inner step returned: the loss closure's loss, or None.

        Raises:
            RuntimeError: there is no KL closure.
            Exception: whatever was raised in between, with all weights and state as before. Only an error of the log,
                the ledger or the recorder comes after the decision: the step is then complete, as `last` has it.
        """
        if args and isinstance(args[0], KLClosure):
            kl, args = args[0], args[1:]
        elif isinstance(kwargs.get("closure"), KLClosure):
            kl = kwargs.pop("closure")
        window = self._run.open
        if kl is not None and window is not None:
            raise RuntimeError("step(kl=...) inside a window: the window is audited as one; pass window(kl=...)")
        args, kwargs = self._run_step_pre_hooks(args, kwargs)
        if window is not None:  # inside a window this is one more part of its candidate
            loss = window.propose(args, kwargs)
        else:
            step = self._new_step(kl, may_wait=loss_closure(args, kwargs) is None)
            with self._ending(step), self._ending(step):
                step.begin()  # theta_t, and its policy as the reference
                loss = step.propose(args, kwargs)  # theta~ = OptStep(theta_t, gradient)
                step.decide()  # theta_t+1
        self._run_step_post_hooks(args, kwargs)
        return loss

    @contextmanager
    def window(self, *, kl: KLClosure | Callable[[], Any] | None = None) -> Iterator[None]:
        """Make all inner steps in the body one candidate: a PPO update of several minibatch steps, audited once.

        `last` is the record of the whole window once it is closed. An exception
        in the body restores the weights and the state from before the window.
        """
        self._refuse_inside_window("window()")
        if kl is None and self._run.kl is None:
            Unbound().audit()  # raises: a window is there to move weights
        step = self._new_step(kl, may_wait=False)
        step.rewind = False  # the body's dropout and data have drawn from the same random streams
        with self._ending(step), self._ending(step):
            step.begin()
            step.in_body = step.windowed = True
            yield
            step.in_body = False
            step.decide()

    def _new_step(self, kl: KLClosure | Callable[[], Any] | None, *, may_wait: bool) -> Step:
        closure = self._fitting(kl) if kl is not None else self._run.kl or Unbound()
        raises = self._on_error == "raise"
        return Step(self._run, self._inner, self._snapshot, self._ranks, closure, may_wait=may_wait, raises=raises)

    def _ending(self, step: Step) -> Atomic:
        return Atomic(step, self._sink, self._on_error)

    def remeasure(self, kept: KeptStep | None, alphas: Sequence[float]) -> StepRecord:
        """Measure more points between theta_t and the candidate of a kept step; afterwards all is as before.

        It takes a reading of theta_t's policy, and an audit of the candidate and of each alpha. All processes call it
        together, between two steps and outside of a backward pass. The KL closure that is bound measures.

        Args:
            kept: one of `read_flight`; None for the latest that ``recorder=`` has kept.
            alphas: parts of the update, 0 to 1.

        Returns:
            The step's record, with a trial for each alpha behind its own.

        Raises:
            RuntimeError: inside a window, or without a KL closure.
            ValueError: a step of other parameters or slices; an alpha beyond 0 to 1; no kept step.
        """
        self._refuse_inside_window("remeasure()")
        return remeasured(self._site, kept, alphas)

    def attribute(self, kept: KeptStep | None = None, *, by: By | None = None, audits: int = 16) -> Attribution:
        """Tell which part of a kept step moved which slice; afterwards all is as before.

        Each part is rolled back to theta_t with the others at the candidate: its effect is K(candidate) - K(without
        it), in nats per token. Beside it stands <grad K(candidate), delta of the part>, where the KL closure has
        gradients. For what both do not add up to, see `Attribution`. It takes a reading of theta_t's policy, an audit
        of the candidate, at most ``audits`` audits of parts, and at most ``audits`` gradients (one for each constraint,
        the nearest to their budgets first): a forward and a backward pass over the control set each.

        Args:
            kept: one of `read_flight`; None for the latest that ``recorder=`` has kept.
            by: what the parts are: ``"group"``; ``"layer"``, by depth; ``"module"``, the owner of the parameter (of
                LoRA's matrices the adapted module); a mapping name pattern -> part; or a function of the name. By
                default the groups, if there are several, else the modules.
            audits: of more parts, those of the largest first-order predictions (or shares of the update) get their own
                audit, and all others one together.

        Raises:
            RuntimeError: inside a window, or without a KL closure.
            ValueError: as `remeasure`; parts that are unknown, or names that are.
        """
        self._refuse_inside_window("attribute()")
        return attributed(self._site, kept, by, audits)

    @property
    def _site(self) -> Site:
        return Site(self._run, self._inner, self._snapshot, self._ranks)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the latest step was rejected (accelerate's name for it)."""
        return self.last is not None and self.last.action is Action.REJECT

    def summary(self) -> dict[str, Any]:
        """Trigger rate, rejection rate, mean alpha, overhead, drift ... since the start; see `Summary.figures`."""
        return self._run.progress.summary.figures()

    @contextmanager
    def _calling(self, name: str) -> Iterator[None]:
        """Around a call of the inner optimizer's own (`first_step`, ...): what moves weights belongs into a step."""
        if self._run.open is not None:
            with self._run.open.part():
                yield
            return
        before = self._snapshot.digest()
        yield
        if self._snapshot.digest() != before:
            self._run.warned.outside(self._inner, name)

    def _own_state(self) -> dict[str, Any]:
        return self._run.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the checkpoint of a `STEPOptimizer`, or that of a bare inner optimizer.

        Raises:
            ValueError: it cannot be read, or is of another run (another control set, other parameter groups); nothing
                has changed then.
        """
        self._refuse_inside_window("load_state_dict()")
        super().load_state_dict(state_dict)

    def _load_own_state(self, state: Mapping[str, Any] | None) -> Callable[[], None]:
        return self._run.loader(state)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the KL closure, which holds a model (`bind` one to a copy), and a log that is not a path."""
        state = super().__getstate__()
        del state["_sink"], state["_snapshot"]
        return state | {"_run": self._run.without_model(), "_log": picklable(self._log)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Make anew what is not copied."""
        super().__setstate__(state)
        self._snapshot, self._sink = self._new_snapshot(), self._open_log()

    def describe(self) -> dict[str, Any]:
        """Return how this run moves and measures, in plain values: the first line of its log."""
        return {
            "optimizer": type(self._inner).__name__,
            "budget": repr(self.budget),
            "controller": repr(self.controller),
            "kl": repr(self._run.kl),
            "audit": {} if self._run.kl is None else self._run.kl.describe(),
            **({} if self._run.unread is None else {"keep": self._run.unread.describe()}),
            "torch": torch.__version__,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._inner).__name__}, {self.budget}, {self.controller!r})"
