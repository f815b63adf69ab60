"""What changes from step to step, apart from the optimizer that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from step_optim.audit import KLClosure
from step_optim.budget import Budget
from step_optim.controllers.base import Action
from step_optim.movement import Movement
from step_optim.summary import Summary
from step_optim.telemetry import StepRecord

if TYPE_CHECKING:
    from step_optim.transaction import Transaction


@dataclass(frozen=True)
class Progress:
    """How far the run has come. It is replaced as a whole, so that an interrupt finds the old or the new one."""

    step: int = 0
    """Steps that are over."""
    rejected_in_a_row: int = 0
    """Those of the latest that a controller rejected."""
    summary: Summary = field(default_factory=Summary)
    last: StepRecord | None = None

    def after(self, record: StepRecord) -> Progress:
        """Count one step."""
        rejected = self.rejected_in_a_row
        if record.triggered:
            rejected = rejected + 1 if record.action is Action.REJECT else 0
        elif record.action is Action.COMMIT:
            rejected = 0
        return replace(
            self, step=self.step + 1, rejected_in_a_row=rejected, summary=self.summary.plus(record), last=record
        )


@dataclass
class Run:
    """The state of a run.

    It is one object: a host may hand out a proxy of the optimizer (Lightning
    does), which would keep for itself what is assigned to it.
    """

    budget: Budget
    kl: KLClosure | None = None
    kl_state: Mapping[str, Any] = field(default_factory=dict)
    """Of a checkpoint that was loaded before there was a KL closure."""
    progress: Progress = field(default_factory=Progress)
    notes: dict[str, Any] = field(default_factory=dict)
    """For the record of the step to come."""
    open: Transaction | None = None
    """The step in progress."""
    anchored: Any = None
    """A fingerprint of the policy that is the KL closure's reference; None if that has to be taken anew."""
    drift: Movement | None = None
    """Of the committed policy from pi_ref; None if it has to be measured."""
    modules: Sequence[nn.Module] = ()
    """Whose buffers are part of the policy."""

    def remember(self, transaction: Transaction) -> None:
        """Keep what the next step begins with, to see whether somebody else writes weights until then."""
        transaction.weights.capture()
        self.modules = transaction.kl.used or self.modules
        record = transaction.record
        # Without an audit, a forward in a loss closure or a window may have moved buffers away from the reference.
        stale = record is not None and record.action is Action.UNCHANGED and not transaction.rewind
        self.anchored = None if stale else transaction.fingerprint()
