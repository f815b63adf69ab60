"""What a run is warned of when something looks wrong: each thing once, with its cause and the remedy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch.optim import Optimizer

from step_optim.audit.closure import KLClosure
from step_optim.budget import Budget
from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.path_length import PathLength
from step_optim.precision import ratio_interval
from step_optim.step.fixed_reference import FixedReference
from step_optim.step.measurable import below_noise, few_prompts
from step_optim.step.stall import Stall
from step_optim.telemetry.record import StepRecord

CARRIES = 1.5
"""Held-out over control movement above which the figures are said not to carry, if the interval is above 1 too."""


class Warned:
    """What was warned of so far. It belongs to a process: a resumed run is warned again."""

    def __init__(self) -> None:
        self.fixed = FixedReference()
        self.of_noise = False
        """Whether a budget is below the audit's noise, and that was said."""
        self._few: set[str] = set()
        self._generalisation: set[str] = set()
        self._methods: set[str] = set()
        self._used_up: set[str] = set()
        """Caps on the path that have left nothing since that was said."""
        self._no_gradient = self._restart = False

    def of_budget(self, budget: Budget, kl: KLClosure) -> None:
        """Look at a budget that was set: it may be below the audit's noise, or limit slices of few prompts."""
        self._used_up.clear()
        # A schedule is held against the noise in every step.
        self.of_noise = not budget.is_scheduled and below_noise(budget.at(0, kl.slices or ()), kl)
        new = [each for each in few_prompts(budget, kl) if each not in self._few]
        self._few.update(new)
        if new:
            warnings.warn(
                f"the budget limits slices of few prompts ({', '.join(new)}), whose figures say little about other "
                "prompts. Give each at least five; after a step, optimizer.last.candidate.precision tells the standard "
                "errors",
                stacklevel=4,
            )

    def outside(self, optimizer: Optimizer, method: str) -> None:
        """A method of the inner optimizer moved weights, and no step was in progress."""
        if method in self._methods:
            return
        self._methods.add(method)
        warnings.warn(
            f"{type(optimizer).__name__}.{method}() moved the weights outside of step(): nothing audited it; use "
            "step(closure), or put the calls into `with optimizer.window():`",
            stacklevel=5,
        )

    def no_gradient(self, optimizer: Optimizer) -> None:
        """A step had no gradient and moved nothing: its parameters are perhaps not those that are trained."""
        if self._no_gradient:
            return
        self._no_gradient = True
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        frozen = sum(not p.requires_grad for p in parameters)
        warnings.warn(
            f"the step moved nothing: none of the optimizer's {len(parameters)} parameters has a gradient, and "
            f"{frozen} of them do not require one. If they were replaced or frozen after the optimizer was made (PEFT "
            "does both), make it from the parameters that are trained: after get_peft_model(), or in a Trainer by "
            "trainer.create_optimizer(). If they are the right ones, call loss.backward() before step()",
            stacklevel=2,
        )

    def of_another_origin(self, budget: Budget, kl: KLClosure, drift: Movement | None) -> None:
        """Another KL closure was bound, which does not know where training began."""
        if budget.caps_drift and drift is not None and not kl.has_origin:
            warnings.warn(
                f"bind(): {type(kl).__name__} has no pi_ref yet, and takes the policy at the next step. The cap on the "
                f"drift begins anew there, though the policy has drifted {drift.mean:.3g} nats per token already. Say "
                "what is meant, bind(kl, origin='keep'), 'adapter_off' or 'now'; or lower the cap by as much",
                stacklevel=4,
            )

    def of_restart(self, budget: Budget, kl: KLClosure) -> None:
        """Observations were renewed, so that a cap on the drift begins anew, and nobody said that it should."""
        if self._restart or not (budget.caps_drift and kl.restarts_unasked):
            return
        self._restart = True
        warnings.warn(
            f"observe(): {kl!r} takes the policy at this step as pi_ref, so that the cap on the drift begins anew with "
            "every new set of observations. Say what is meant when the closure is made: PolicyKL(..., drift='keep') "
            "measures from the policy at the start on whatever observations, drift='restart' from the latest renewal",
            stacklevel=5,
        )

    def of_decided(self, record: StepRecord, kl: KLClosure) -> None:
        """Look at a step that was decided."""
        self._used_up.intersection_update(map(record.budget.told, record.budget.used_up))
        self._of_generalisation(record, kl)

    def _of_generalisation(self, record: StepRecord, kl: KLClosure) -> None:
        """Held-out prompts moved more than those that judge."""
        for name, what in (("step", "moved"), ("drift", "drifted")):
            ratio, error = record.generalisation.get(name, 0.0), record.generalisation.get(f"{name}_error", 0.0)
            if ratio <= CARRIES or name in self._generalisation or not math.isfinite(error):
                continue
            low, high = ratio_interval(ratio, error)
            if low <= 1:  # so few prompts say nothing
                continue
            self._generalisation.add(name)
            pool = "" if getattr(kl, "pool", None) is not None else ", and under Steer a pool of other prompts (pool=)"
            warnings.warn(
                f"held-out prompts {what} {ratio:.2g} times as far as the control set (95 % interval {low:.2g} to "
                f"{high:.2g}): budgets on the control set do not carry to prompts like these. Give the control set "
                f"more prompts of their kinds (optimizer.last.candidate.precision tells how many){pool}",
                stacklevel=2,
            )

    def of_used_up(self, limits: Limits, constraints: Sequence[str], path: PathLength) -> None:
        """Caps on the path have left nothing."""
        for name in map(limits.told, constraints):
            cap, slice_ = limits.of(name), name.partition(":")[2] or None
            if name in self._used_up:
                continue
            self._used_up.add(name)
            which, of = ("path", "") if slice_ is None else (f"path_slices[{slice_!r}]", f" of slice {slice_!r}")
            warnings.warn(
                f"budget.{which}={cap:.6g} is used up: the path length{of} is {path.of(slice_):.6g} nats per token. "
                "Steps that would move the policy there are rejected as long as that is so. End the training here, or "
                f"raise the cap: optimizer.set_budget(Budget({which.partition('[')[0]}=...))",
                stacklevel=2,
            )

    def of_stall(self, stall: Stall) -> None:
        """Several steps in a row were rejected."""
        warnings.warn(str(stall), stacklevel=2)
