"""STEPOptimizer: every optimizer step is a transaction on the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from step_optim.audit.closure import KLClosure, Unbound, as_kl
from step_optim.budget import Bound, Budget
from step_optim.controllers.base import Action, Controller
from step_optim.host.ranks import WORLD, Ranks
from step_optim.host.wrapper import OptimizerWrapper, hooked
from step_optim.snapshot.known import ParamLike, known_copies
from step_optim.snapshot.snapshot import Snapshot
from step_optim.step.atomic import Atomic
from step_optim.step.checks import (
    check_controller,
    check_inner,
    check_line,
    check_measures,
    check_rates,
    default_controller,
    plain_note,
)
from step_optim.step.measurable import check_budget
from step_optim.step.progress import Run
from step_optim.step.proposal import loss_closure
from step_optim.step.stages import Stages
from step_optim.step.step import Step
from step_optim.telemetry.ledger import Ledger
from step_optim.telemetry.log import open_log
from step_optim.telemetry.record import StepRecord
from step_optim.telemetry.trackers import Sink


class STEPOptimizer(OptimizerWrapper):
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
        log: a path for JSON lines, a tracker with ``log(dict, step=...)``, or
            a callable(dict, step).
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

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a budget for unknown slices; parameters that the KL
            closure's model does not have; `Project` over a closure without
            logits; ``differentiable=True`` inside; an optimizer that steps in
            the backward pass, or whose weights cannot be interpolated.

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
        super().__init__(optimizer)
        self._on_error, self._log = on_error, log
        self._snapshot_on = snapshot
        self._param_like = known_copies(optimizer) if param_like is None else param_like
        self._run = Run(budget, controller, named, adaptive_rate)
        self._snapshot, self._ranks = self._new_snapshot(), Ranks(process_group)
        self._sink = self._open_log()
        self._run.stages = None if ledger is None else Stages(ledger, self._ranks)
        if kl is not None:
            self.bind(kl)

    def _new_snapshot(self) -> Snapshot:
        """Make what captures and moves the weights; nothing of it is part of a checkpoint."""
        return Snapshot(self._inner, host=self._snapshot_on == "cpu", param_like=self._param_like)

    def _open_log(self) -> Sink:
        return open_log(self._log, self._header, lambda: self._ranks.first)

    @property
    def budget(self) -> Budget:
        """The budget; to assign another one is `set_budget`."""
        return self._run.budget

    @budget.setter
    def budget(self, budget: Budget | Bound) -> None:
        self.set_budget(budget)

    @property
    def controller(self) -> Controller:
        """What decides about an infeasible candidate; another one may be assigned between two steps."""
        return self._run.controller

    @controller.setter
    def controller(self, controller: Controller) -> None:
        self._refuse_inside_window("another controller")
        check_line(self._inner, check_controller(controller), self.budget)
        if self._run.kl is not None:
            check_measures(self._run.kl, controller, self._inner, self._ranks, self.budget)
        if controller is not self.controller:
            self._run.controller, self._run.named, self._run.memory = controller, True, {}

    @property
    def last(self) -> StepRecord | None:
        """The record of the latest step; None before the first."""
        return self._run.progress.last

    def bind(self, kl: KLClosure | Callable[[], Any], *, origin: str | None = None) -> None:
        """Set the KL closure: later than the optimizer under PEFT, DDP and FSDP; or another one, for other prompts.

        Args:
            kl: the KL closure.
            origin: what becomes of pi_ref, from which drift is measured. ``"keep"``: it stays the policy at the start
                of the run, if that is known on these prompts. ``"adapter_off"``: PEFT's base model. ``"now"``: the
                policy at the next step. By default what the closure brings along, else the policy at the next step,
                with a warning where a cap on the drift begins anew.

        Raises:
            ValueError: it does not fit the budget, the controller or the parameters; a pi_ref that is not known.
        """
        self._refuse_inside_window("bind()")
        closure = as_kl(kl)
        controller = self._for(self.budget, closure)
        self._check(closure, controller)
        self._run.take(closure, controller, origin)

    def set_budget(self, budget: Budget | Bound) -> None:
        """Replace the budget, from the next step on."""
        new = Budget.of(budget)
        controller = self._for(new, self._run.kl)
        check_line(self._inner, controller, new)
        if self._run.kl is not None:
            check_budget(new, self._run.kl)
            check_measures(self._run.kl, controller, self._inner, self._ranks, new)
            self._run.warned.of_budget(new, self._run.kl)
        self._run.budget, self._run.controller = new, controller

    def refresh(self, *, restart_drift: bool = False) -> None:
        """Take the reference anew at the next step.

        Needed after an edit that cannot be noticed: of a part of a frozen
        weight through `.data` (whole ones are; see `fingerprint`), of a plain
        attribute of a module (a scaling factor), or of what a `PolicyKL`
        function closes over: observations, or another model.

        Args:
            restart_drift: also make the policy at the next step pi_ref. Needed
                after new observations, on which the old pi_ref is not known.
        """
        self._refuse_inside_window("refresh()")
        self._run.anchored = None
        if self._run.kl is not None:
            self._run.kl.forget_attributes()
            if restart_drift:
                self._run.kl.forget_origin()
                self.controller.forget_reference(self._run.memory)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its movement counts from the next step on."""
        self._refuse_inside_window("add_param_group()")
        super().add_param_group(param_group)
        try:
            check_line(self._inner, self.controller, self.budget)
            if self._run.kl is not None:
                self._run.kl.check_parameters(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise
        self._run.anchored = None  # more weights are watched from now on
        self.controller.forget_reference(self._run.memory)

    def _refuse_inside_window(self, what: str) -> None:
        if self._run.open is not None:
            raise RuntimeError(f"{what} inside a window could not be rolled back with it; call it before or after")

    def note(self, *, reward: float | None = None, success: bool | None = None, **values: Any) -> None:
        """Add figures of the training loop to the record of the next step.

        Args:
            reward: of this step's rollout.
            success: whether the step counts as one that completed.
            **values: numbers (tensors and arrays too), texts or flags, or lists of these: ``batch=ids``, say.
        """
        given = {"reward": reward, "success": success, **values}
        self._run.notes |= {name: plain_note(name, value) for name, value in given.items() if value is not None}

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
            Exception: whatever was raised in between, with all weights and state as before. Only an error of the log
                comes after the decision: the step is then complete, as `last` has it.
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

    @property
    def step_was_skipped(self) -> bool:
        """Whether the latest step was rejected (accelerate's name for it)."""
        return self.last is not None and self.last.action is Action.REJECT

    def summary(self) -> dict[str, Any]:
        """Trigger rate, rejection rate, mean alpha, overhead, drift ... since the start; see `Summary.figures`."""
        return self._run.progress.summary.figures()

    def _for(self, budget: Budget, kl: KLClosure | None) -> Controller:
        """The controller for a budget and a KL closure: the one that was named, or the default."""
        default = default_controller(budget, kl, self._inner)
        return self.controller if self._run.named or type(default) is type(self.controller) else default

    def _fitting(self, kl: KLClosure | Callable[[], Any]) -> KLClosure:
        """Read the argument ``kl=`` of one step, or of one window."""
        closure = as_kl(kl)
        self._check(closure, self.controller)
        return closure

    def _check(self, kl: KLClosure, controller: Controller) -> None:
        """Refuse a KL closure that does not fit the budget, a controller or the parameters."""
        check_budget(self.budget, kl)
        kl.check_parameters([p for group in self.param_groups for p in group["params"]])
        check_measures(kl, controller, self._inner, self._ranks, self.budget)

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
        log = self._log if isinstance(self._log, (str, Path)) else None
        del state["_sink"], state["_snapshot"]
        return state | {"_run": self._run.without_model(), "_log": log}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Make anew what is not copied."""
        super().__setstate__(state)
        self._snapshot, self._sink = self._new_snapshot(), self._open_log()

    def _header(self) -> dict[str, Any]:
        """First line of a log."""
        return {
            "optimizer": type(self._inner).__name__,
            "budget": repr(self.budget),
            "controller": repr(self.controller),
            "kl": repr(self._run.kl),
            "audit": {} if self._run.kl is None else self._run.kl.describe(),
            "torch": torch.__version__,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._inner).__name__}, {self.budget}, {self.controller!r})"
