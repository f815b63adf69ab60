"""What `STEPOptimizer` refuses before any weight moves."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from step_optim.audit import KLClosure
from step_optim.budget import Budget
from step_optim.wrapper import OptimizerWrapper


def check_inner(optimizer: Any) -> None:
    """Refuse what cannot be wrapped."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer={optimizer!r:.60} is no torch optimizer; pass torch.optim.AdamW(...), say")
    if isinstance(optimizer, OptimizerWrapper):
        raise TypeError("optimizer is a STEPOptimizer already; pass the optimizer inside it, optimizer.optimizer")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            "differentiable=True: a rollback in place would break the graph through the step; use differentiable=False"
        )


def plain_note(name: str, value: Any) -> Any:
    """A value that every log can hold."""
    if hasattr(value, "item"):
        value = (value.detach() if hasattr(value, "detach") else value).item()
    if not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"note({name}={value!r:.60}) is no number, text or flag; reduce it first")
    return value


def check_budget(budget: Budget, kl: KLClosure) -> None:
    """Refuse a budget for what a KL closure does not measure."""
    budget.check_slices(kl.slices)
    if budget.reference is not None and budget.reference != math.inf and not kl.measures_drift:
        raise ValueError(f"budget.reference needs a KL closure that measures drift (TokenKL, PolicyKL), not {kl!r}")
