"""step_optim: a trust region that holds after the optimizer step.

Each optimizer step is a transaction on the policy. The inner optimizer
proposes, an audit measures what the proposal did to the policy on a control
set, and the proposal, a smaller version of it, or nothing is committed::

    from step_optim import STEPOptimizer, Budget, ControlSet, TokenKL, Interpolate

    control = ControlSet.from_texts(tokenizer, prompts, responses, slices={"math": [0, 1], "safety": [2, 3]})
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

from step_optim.audit.closure import Audit, FunctionKL, KLClosure, kl_closure
from step_optim.audit.policy_kl import PolicyKL
from step_optim.audit.token_kl import TokenKL
from step_optim.budget import Budget, Limits, Verdict
from step_optim.control.control_set import ControlSet
from step_optim.controllers import (
    Action,
    Controller,
    Gate,
    GateStalled,
    Interpolate,
    Outcome,
    Point,
    Project,
    Trial,
)
from step_optim.movement import Movement
from step_optim.objective.ppo import AdaptiveKL, TargetKL, sampled_kl
from step_optim.objective.references import EMAReference, FixedReference, RatchetReference, Reference, ReferenceAction
from step_optim.optimizer import STEPOptimizer
from step_optim.telemetry.log import read_log
from step_optim.telemetry.record import StepRecord
from step_optim.telemetry.summary import summarise

__version__ = "0.1.0"

__all__ = [
    "Action",
    "AdaptiveKL",
    "Audit",
    "Budget",
    "ControlSet",
    "Controller",
    "EMAReference",
    "FixedReference",
    "FunctionKL",
    "Gate",
    "GateStalled",
    "Interpolate",
    "KLClosure",
    "Limits",
    "Movement",
    "Outcome",
    "Point",
    "PolicyKL",
    "Project",
    "RatchetReference",
    "Reference",
    "ReferenceAction",
    "STEPOptimizer",
    "StepRecord",
    "TargetKL",
    "TokenKL",
    "Trial",
    "Verdict",
    "kl_closure",
    "read_log",
    "sampled_kl",
    "summarise",
]
