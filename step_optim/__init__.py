"""step_optim: a trust region that holds after the optimizer step.

Each optimizer step is a transaction on the policy. The inner optimizer
proposes, an audit measures what the proposal did to the policy on a control
set, and the proposal, a smaller version of it, or nothing is committed::

    from step_optim import STEPOptimizer, Budget, ControlSet, TokenKL, Interpolate

    control = ControlSet.standard(model, tokenizer)  # or from_messages, from_texts, from_ids, from_batches
    optimizer = STEPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=2e-4),
        kl=TokenKL(model, control),
        budget=Budget(mean=0.03, slices=0.05),  # nats per token
        controller=Interpolate(),
        log="run.jsonl",
    )
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    optimizer.last  # StepRecord of this step
"""

from typing import TYPE_CHECKING

from step_optim.audit import KLClosure, PolicyKL, TokenKL, kl_closure
from step_optim.budget import Budget
from step_optim.control import ControlSet
from step_optim.controllers import (
    Action,
    Controller,
    Gate,
    GateStalled,
    Interpolate,
    ModelSearch,
    Outcome,
    Project,
    Steer,
    Trial,
)
from step_optim.movement import Movement
from step_optim.optimizer import STEPOptimizer
from step_optim.telemetry import Ledger, StepRecord, read_log, summarise

__version__ = "0.1.0"

__all__ = [
    "Action",
    "Budget",
    "ControlSet",
    "Controller",
    "Gate",
    "GateStalled",
    "Interpolate",
    "KLClosure",
    "Ledger",
    "ModelSearch",
    "Movement",
    "Outcome",
    "PolicyKL",
    "Project",
    "STEPOptimizer",
    "Steer",
    "StepRecord",
    "TokenKL",
    "Trial",
    "kl_closure",
    "read_log",
    "summarise",
]

_MOVED = {
    "step_optim.audit": ("Audit", "FunctionKL"),
    "step_optim.budget": ("Limits", "Verdict"),
    "step_optim.controllers": ("Point",),
    "step_optim.objective": (
        "AdaptiveKL",
        "EMAReference",
        "FixedReference",
        "RatchetReference",
        "Reference",
        "ReferenceAction",
        "TargetKL",
        "sampled_kl",
    ),
}
"""Names that stood here once, by where they live."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Find a name that has moved: imports from here go on working."""
        from importlib import import_module

        for module, names in _MOVED.items():
            if name in names:
                return getattr(import_module(module), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
