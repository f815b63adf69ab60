"""What may be changed between two steps of a `STEPOptimizer`: budget, controller and KL closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from step_optim.audit.closure import KLClosure, as_kl
from step_optim.budget import Bound, Budget
from step_optim.controllers.base import Controller
from step_optim.host.ranks import Ranks
from step_optim.host.wrapper import OptimizerWrapper
from step_optim.step.checks import check_controller, check_line, check_measures, default_controller, plain_note
from step_optim.step.measurable import check_budget
from step_optim.step.progress import Run
from step_optim.telemetry.record import StepRecord


class AdjustableOptimizer(OptimizerWrapper):
    """An optimizer with a run, whose settings may be changed between two steps.

    What does not fit the rest is refused, and nothing has changed then.

    Args:
        optimizer: the inner optimizer.
        run: the state of the run.
        ranks: who decides together.
    """

    def __init__(self, optimizer: Optimizer, run: Run, ranks: Ranks) -> None:
        super().__init__(optimizer)
        self._run, self._ranks = run, ranks

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
    def kl(self) -> KLClosure | None:
        """The KL closure; None before there is one. To set another one, `bind` it."""
        return self._run.kl

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
        self._run.forget_unread()
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
        self._run.forget_unread()
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
