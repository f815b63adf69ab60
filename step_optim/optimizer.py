"""STEPOptimizer: every optimizer step is a transaction on the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from step_optim.audit import KLClosure, as_kl
from step_optim.budget import Bound, Budget
from step_optim.checks import check_budget, check_inner, plain_note
from step_optim.controllers.base import Action, Controller, Outcome
from step_optim.controllers.gate import GateStalled
from step_optim.controllers.interpolate import Interpolate
from step_optim.movement import Movement
from step_optim.snapshot import Weights
from step_optim.state import OptimizerState
from step_optim.summary import Summary
from step_optim.telemetry import StepRecord, open_log
from step_optim.transaction import Transaction
from step_optim.wrapper import OptimizerWrapper, hooked


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
            the weights before the step. It may come later, through `bind`.
        budget: a `Budget`, or a number for ``Budget(mean=number)``.
        controller: `Interpolate` (default), `Gate`, `Project`, or your own `Controller`.
        log: a path for JSON lines, a tracker with ``log(dict, step=...)``, or
            a callable(dict, step).
        on_error: what an exception in the audit does, once the weights are
            restored: ``"raise"`` it, or ``"reject"`` the step and record it.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a budget for unknown slices; parameters that the KL
            closure's model does not have; `Project` over a closure without
            logits; ``differentiable=True`` inside.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> start = weight.detach().clone()
    >>> optimizer = STEPOptimizer(
    ...     torch.optim.SGD([weight], lr=1.0),
    ...     kl=lambda: ((weight - start) ** 2).sum(),
    ...     budget=0.25,
    ... )
    >>> weight.grad = torch.tensor([-1.0, 0.0])
    >>> optimizer.step()
    >>> optimizer.last.action, round(optimizer.last.alpha, 2)
    (<Action.SHRINK: 'shrink'>, 0.5)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        kl: KLClosure | Callable[[], Any] | None = None,
        *,
        budget: Budget | Bound,
        controller: Controller | None = None,
        log: str | Path | Callable[..., Any] | Any = None,
        on_error: str = "raise",
    ) -> None:
        check_inner(optimizer)
        if on_error not in ("raise", "reject"):
            raise ValueError(f"on_error={on_error!r} is unknown; use 'raise' or 'reject'")
        if controller is not None and not isinstance(controller, Controller):
            raise TypeError(
                f"controller={controller!r} is no Controller; use Gate(), Interpolate(), Project() or a subclass"
            )
        super().__init__(optimizer)
        self.budget = Budget.of(budget)
        self.controller = Interpolate() if controller is None else controller
        self._on_error = on_error
        self._log = log
        self._sink = open_log(log, self._header)
        self._kl: KLClosure | None = None
        self._kl_state: Mapping[str, Any] = {}
        self._start()
        self._step = self._rejected_in_a_row = 0
        self._summary = Summary()
        self._notes: dict[str, Any] = {}
        self.last: StepRecord | None = None
        """The record of the latest step; None before the first."""
        if kl is not None:
            self.bind(kl)

    def _start(self) -> None:
        """Make what is not part of a checkpoint."""
        self._weights, self._state = Weights(self._inner), OptimizerState(self._inner)
        self._open: Transaction | None = None
        self._anchored: Any = None
        self._drift: Movement | None = None
        self._modules: Sequence[nn.Module] = ()  # whose buffers are part of the policy

    def bind(self, kl: KLClosure | Callable[[], Any]) -> None:
        """Set the KL closure: later than the optimizer under PEFT, DDP and FSDP, or again after a refresh.

        Raises:
            ValueError: it does not fit the budget, the controller or the parameters.
        """
        self._refuse_inside_window("bind()")
        self._kl = self._fitting(kl)
        self._kl.load_state_dict(self._kl_state)
        self._kl_state = {}
        self._anchored = None

    def set_budget(self, budget: Budget | Bound) -> None:
        """Replace the budget, from the next step on."""
        new = Budget.of(budget)
        if self._kl is not None:
            check_budget(new, self._kl)
        self.budget = new

    def refresh(self, *, restart_drift: bool = False) -> None:
        """Take the reference anew at the next step.

        Needed after an edit that cannot be noticed: of a frozen weight through
        `.data`, or of the observations that a `PolicyKL` function closes over.

        Args:
            restart_drift: also make the policy at the next step pi_ref. Needed
                after new observations, on which the old pi_ref is not known.
        """
        self._refuse_inside_window("refresh()")
        self._anchored = None
        if restart_drift and self._kl is not None:
            self._kl.forget_origin()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its movement counts from the next step on."""
        self._refuse_inside_window("add_param_group()")
        super().add_param_group(param_group)
        try:
            if self._kl is not None:
                self._kl.check_parameters(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    def _refuse_inside_window(self, what: str) -> None:
        if self._open is not None:
            raise RuntimeError(f"{what} inside a window could not be rolled back with it; call it before or after")

    def note(self, *, reward: float | None = None, success: bool | None = None, **values: Any) -> None:
        """Add figures of the training loop to the record of the next step.

        Args:
            reward: of this step's rollout.
            success: whether the step counts as one that completed.
            **values: numbers (tensors and arrays of one element, too), texts or flags.
        """
        given = {"reward": reward, "success": success, **values}
        self._notes |= {name: plain_note(name, value) for name, value in given.items() if value is not None}

    @hooked
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        kl: KLClosure | Callable[[], Any] | None = None,
        **inner: Any,
    ) -> Any:
        """Propose, audit, decide: the paper's Algorithm 1.

        Args:
            closure: torch's loss closure; it goes to the inner optimizer
                untouched. A `KLClosure` in its place is taken as ``kl``.
            kl: the KL closure of this step only.
            **inner: further arguments of the inner step.

        Returns:
            What the inner step returned: the loss closure's loss, or None.

        Raises:
            RuntimeError: there is no KL closure.
            Exception: whatever was raised in between, with all weights and state as before. Only an error of the log
                comes after the decision: the step is then complete, as `last` has it.
        """
        if isinstance(closure, KLClosure):
            closure, kl = None, closure
        if kl is not None and self._open is not None:
            raise RuntimeError("step(kl=...) inside a window: the window is audited as one; pass window(kl=...)")
        closure, inner = self._run_step_pre_hooks(closure, inner)
        if self._open is not None:  # inside a window this is one more part of its candidate
            loss = self._open.propose(closure, inner)
        else:
            with self._transaction(kl) as transaction:
                loss = transaction.propose(closure, inner)
        self._run_hooks("_optimizer_step_post_hooks", self._step_arguments(closure), inner)
        return loss

    @contextmanager
    def window(self, *, kl: KLClosure | Callable[[], Any] | None = None) -> Iterator[None]:
        """Make all inner steps in the body one candidate: a PPO update of several minibatch steps, audited once.

        `last` is the record of the whole window once it is closed. An exception
        in the body restores the weights and the state from before the window.
        """
        self._refuse_inside_window("window()")
        with self._transaction(kl) as transaction:
            transaction.rewind = False  # the body's dropout and data have drawn from the same random streams
            yield

    @contextmanager
    def _transaction(self, kl: KLClosure | Callable[[], Any] | None) -> Iterator[Transaction]:
        transaction = self._begin(kl)  # theta_t, and its policy as the reference
        proposed = False
        try:
            self._open = transaction
            yield transaction  # theta~ = OptStep(theta_t, gradient)
            proposed = True
            record = self._decide(transaction)  # theta_t+1
        except BaseException as error:
            self._open = None
            transaction.restore()  # theta_t, whatever happened
            rejected = proposed and self._on_error == "reject" and isinstance(error, Exception)
            self._fail(transaction, error, quietly=not rejected)
            if not rejected or isinstance(error, GateStalled):
                raise
        else:
            self._open = None
            self._finish(transaction, record)

    def _begin(self, kl: KLClosure | Callable[[], Any] | None) -> Transaction:
        """Capture theta_t, and take its policy as the reference unless it is that already."""
        closure = self._kl if kl is None else self._fitting(kl)
        if closure is None:
            raise RuntimeError(
                "STEPOptimizer has no KL closure: nothing would be measured. Pass kl= to the constructor or to step(), "
                "or call bind(kl) once the model is wrapped"
            )
        transaction = Transaction(self._inner, self._weights, self._state, closure, self.budget, self._step)
        anchored, self._anchored = self._anchored, None  # until it is certain again
        if not transaction.capture_weights() or anchored is None or anchored != self._fingerprint(closure):
            with transaction.clock("audit"):
                closure.anchor()
            self._drift = None
        self._modules = closure.used or self._modules
        transaction.capture_state(self._modules)
        return transaction

    def _fingerprint(self, kl: KLClosure) -> Any:
        return kl, kl.fingerprint({id(p) for group in self.param_groups for p in group["params"]})

    def _decide(self, transaction: Transaction) -> StepRecord:
        """Commit a feasible candidate; otherwise do what the controller says."""
        if not transaction.moved():
            return transaction.record(Outcome(Action.UNCHANGED), None, self._drift_of(transaction))
        candidate = transaction.candidate()  # K_global and K_s on the control set
        if candidate.feasible:
            outcome = Outcome(Action.COMMIT, candidate)
        elif not math.isfinite(transaction.update_norm):
            outcome = Outcome(Action.REJECT)  # no part of it is finite either
        else:
            with transaction.clock("search"):
                outcome = self.controller.decide(transaction.trial(candidate, self._rejected_in_a_row))
        outcome = transaction.settle(outcome, self.controller.on_reject)
        if outcome.point is not None:
            with transaction.clock("audit"):
                transaction.kl.anchor(outcome.point.audit)  # the audit that licensed it is the next reference
            self._drift = outcome.point.drift
        return transaction.record(outcome, candidate, self._drift_of(transaction))

    def _drift_of(self, transaction: Transaction) -> Movement | None:
        """Movement of the committed policy from pi_ref; measured again only if the policy changed."""
        if self._drift is None and transaction.kl.measures_drift:
            with transaction.clock("audit"):
                self._drift = transaction.kl.drift()
        return self._drift

    def _finish(self, transaction: Transaction, record: StepRecord) -> None:
        """Remember what was committed, count the step, write the record."""
        with transaction.clock("snapshot"):
            self._weights.capture()
            self._state.release()
            self._anchored = self._fingerprint(transaction.kl)
        self._modules = transaction.kl.used or self._modules
        if record.triggered:
            self._rejected_in_a_row = self._rejected_in_a_row + 1 if record.action is Action.REJECT else 0
        elif record.action is Action.COMMIT:
            self._rejected_in_a_row = 0
        self._write(transaction, record)

    def _fail(self, transaction: Transaction, error: BaseException, *, quietly: bool) -> None:
        """Record a step that ended in an error. The reference is taken anew: the audit may have replaced it."""
        self._state.release()
        # An error of the log must not take the place of the error that is being raised.
        with suppress(Exception) if quietly else nullcontext():
            self._write(transaction, transaction.failed(error))

    def _write(self, transaction: Transaction, record: StepRecord) -> None:
        notes, self._notes = self._notes, {}
        record = replace(
            record,
            seconds=dict(transaction.seconds),
            reward=notes.pop("reward", None),
            success=notes.pop("success", True) and record.success,
            notes=notes,
        )
        self._step += 1
        self.last = record
        self._summary.add(record)
        self._sink(record)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the latest step was rejected (accelerate's name for it)."""
        return self.last is not None and self.last.action is Action.REJECT

    def summary(self) -> dict[str, Any]:
        """Trigger rate, rejection rate, mean alpha, overhead, drift ... since the start; see `Summary.figures`."""
        return self._summary.figures()

    def _fitting(self, kl: KLClosure | Callable[[], Any]) -> KLClosure:
        """Refuse a KL closure that does not fit the budget, the controller or the parameters."""
        closure = as_kl(kl)
        check_budget(self.budget, closure)
        if self.controller.needs_logits and not closure.has_logits:
            raise ValueError(
                f"controller={self.controller!r} works on logits, and kl={closure!r} has none; use TokenKL, a PolicyKL "
                "over logits, or Interpolate()"
            )
        closure.check_parameters([p for group in self.param_groups for p in group["params"]])
        return closure

    def _own_state(self) -> dict[str, Any]:
        return {
            "version": 1,
            "step": self._step,
            "rejected_in_a_row": self._rejected_in_a_row,
            "summary": self._summary.state_dict(),
            "controller": self.controller.state_dict(),
            "kl": dict(self._kl_state) if self._kl is None else self._kl.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the checkpoint of a `STEPOptimizer`, or that of a bare inner optimizer."""
        self._refuse_inside_window("load_state_dict()")
        super().load_state_dict(state_dict)

    def _load_own_state(self, state: Mapping[str, Any] | None) -> None:
        self._anchored = None
        if state is None:  # the checkpoint of a bare optimizer
            return
        if state["version"] != 1:
            raise ValueError(f"the checkpoint is of version {state['version']}, this step_optim reads 1; upgrade it")
        if self._kl is not None:
            self._kl.load_state_dict(state["kl"])  # refuses another control set before anything has changed
        else:
            self._kl_state = state["kl"]
        self._step, self._rejected_in_a_row = int(state["step"]), int(state["rejected_in_a_row"])
        self._summary.load_state_dict(state["summary"])
        self.controller.load_state_dict(state["controller"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the KL closure, which holds a model (`bind` one to a copy), and a log that is not a path."""
        state = super().__getstate__() | {"_kl_state": self._own_state()["kl"], "_kl": None, "_notes": {}}
        for name in ("_sink", "_weights", "_state", "_open", "_anchored", "_modules"):
            del state[name]
        if not isinstance(self._log, (str, Path)):
            state["_log"] = None
        return state

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Make anew what is not copied."""
        super().__setstate__(state)
        self._sink = open_log(self._log, self._header)
        self._start()

    def _header(self) -> dict[str, Any]:
        """First line of a log."""
        return {
            "optimizer": type(self._inner).__name__,
            "budget": repr(self.budget),
            "controller": repr(self.controller),
            "kl": repr(self._kl),
            "torch": torch.__version__,
        }

    def __repr__(self) -> str:
        return f"STEPOptimizer({type(self._inner).__name__}, {self.budget}, {self.controller!r})"
