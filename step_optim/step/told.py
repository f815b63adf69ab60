"""What a run is warned of when something looks wrong: each thing once, with its cause and the remedy."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from step_optim.audit.closure import FunctionKL
from step_optim.controllers.base import Point
from step_optim.step.fixed_reference import FixedReference
from step_optim.step.stall import Stall, is_told

if TYPE_CHECKING:
    from step_optim.step.progress import Progress, Run
    from step_optim.step.transaction import Transaction


class Told:
    """What was warned of so far. It belongs to a process: a resumed run is told again."""

    def __init__(self) -> None:
        self.fixed = FixedReference()
        self._methods: set[str] = set()
        self._no_gradient = False

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

    def no_gradient(self, transaction: Transaction) -> None:
        """A step moved nothing; if it had no gradient either, its parameters are perhaps not those that are trained."""
        if self._no_gradient or not transaction.idle:
            return
        self._no_gradient = True
        parameters = [p for group in transaction.optimizer.param_groups for p in group["params"]]
        frozen = sum(not p.requires_grad for p in parameters)
        warnings.warn(
            f"the step moved nothing: none of the optimizer's {len(parameters)} parameters has a gradient, and "
            f"{frozen} of them do not require one. If they were replaced or frozen after the optimizer was made (PEFT "
            "does both), make it from the parameters that are trained: after get_peft_model(), or in a Trainer by "
            "trainer.create_optimizer(). If they are the right ones, call loss.backward() before step()",
            stacklevel=2,
        )

    def stall(self, run: Run, transaction: Transaction, candidate: Point) -> None:
        """A controller rejected a step; if it was the fifth in a row, or the fiftieth, say why and what helps."""
        rejected = run.progress.rejected_in_a_row + 1
        if is_told(rejected) and rejected > (run.controller.patience or 0):
            why = self.why(run.progress, transaction, candidate, rejected, run.adaptive_rate)
            warnings.warn(str(why), stacklevel=2)

    def why(
        self, progress: Progress, transaction: Transaction, candidate: Point, rejected: int, adaptive_rate: bool
    ) -> Stall:
        """Put together what is known about rejections in a row; the weights are theta_t."""
        if isinstance(transaction.kl, FunctionKL):
            transaction.look()
            self.fixed.judge(transaction.kl, transaction.still, candidate, transaction.limits)
        constraint = candidate.constraint
        return Stall(
            rejected,
            progress.bound_by(constraint),
            candidate,
            transaction.limits,
            transaction.update_norm,
            tried=transaction.trials[1:],
            drift=transaction.drift() if constraint == "reference" else None,
            still=transaction.still,
            rounded=transaction.rounded,
            adaptive_rate=adaptive_rate,
        )
