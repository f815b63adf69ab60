"""What `STEPOptimizer` refuses before any weight moves."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch.optim import Optimizer

from step_optim.audit.closure import KLClosure
from step_optim.budget import Budget
from step_optim.controllers.base import Controller
from step_optim.controllers.interpolate import Interpolate
from step_optim.controllers.steer import Steer
from step_optim.host.modules import named_parameters, outermost
from step_optim.host.ranks import Ranks
from step_optim.host.wrapper import OptimizerWrapper
from step_optim.snapshot.known import steps_in_backward, why_recomputed
from step_optim.snapshot.tensors import shard_count

INTERFACE = ("param_groups", "state", "step", "zero_grad", "state_dict", "load_state_dict")


def check_inner(optimizer: Any) -> None:
    """Refuse what cannot be wrapped."""
    missing = [name for name in INTERFACE if not hasattr(optimizer, name)]
    if missing:  # a look-alike, schedulefree.ScheduleFreeWrapper say, will do
        raise TypeError(
            f"optimizer={_shown(optimizer)} is no torch optimizer (it has no {missing[0]}); pass "
            "torch.optim.AdamW(...), say"
        )
    if isinstance(optimizer, OptimizerWrapper):
        raise TypeError("optimizer is a STEPOptimizer already; pass the optimizer inside it, optimizer.optimizer")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            "differentiable=True: a rollback in place would break the graph through the step; use differentiable=False"
        )
    if steps_in_backward(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} moves the weights inside the backward pass: there is no candidate to audit. "
            "Use an optimizer that moves them in step()"
        )


def _shown(optimizer: Any) -> str:
    try:
        return f"{optimizer!r:.60}"
    except AttributeError:  # torch's own repr wants parameter groups
        return type(optimizer).__name__


def check_line(optimizer: Optimizer, controller: Controller, budget: Budget) -> None:
    """Refuse a controller that moves weights to where this optimizer would not keep them.

    A budget that only measures takes nothing back.
    """
    reason = why_recomputed(optimizer) if budget.limits_anything else None
    if reason is not None and (controller.shrinks or controller.on_reject == "keep_state"):
        raise ValueError(
            f"{type(optimizer).__name__} {reason}: what a shrunk step took back would return with the next step. Use "
            "Gate() with on_reject='restore'; adaptive_rate=True leads it out of rejecting for ever"
        )


def check_rates(optimizer: Optimizer) -> None:
    """Refuse ``adaptive_rate=True`` where there is no learning rate to scale.

    Raises:
        ValueError: a parameter group without one.
    """
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"adaptive_rate=True scales the learning rate, and {type(optimizer).__name__} has a parameter group "
            "without one; use adaptive_rate=False"
        )


def default_controller(budget: Budget, kl: KLClosure | None, optimizer: Optimizer) -> Controller:
    """What decides if nobody was named: at a cap, shortened steps end learning, and a pool is there to steer by."""
    if not budget.caps_drift or getattr(kl, "pool", None) is None:
        return Interpolate()
    assert kl is not None
    return Steer() if kl.reduces_gradients or not _split(optimizer) else Interpolate()


def check_controller(controller: Any) -> Controller:
    """Refuse what cannot decide, and options of a subclass that would be taken for something else."""
    if not isinstance(controller, Controller):
        raise TypeError(
            f"controller={controller!r} is no Controller; use Gate(), Interpolate(), Project() or a subclass"
        )
    controller.check_options()
    return controller


def check_measures(kl: KLClosure, controller: Controller, optimizer: Optimizer, ranks: Ranks, budget: Budget) -> None:
    """Refuse a controller that needs more than a KL closure, or one process, can tell it."""
    if modules := outermost(kl.modules()):
        controller.check_names(list(named_parameters(modules)))
    if controller.follows_gradients:
        _check_directions(kl, controller, optimizer, budget)
        _check_reduced(kl, controller, ranks, budget)
    if not controller.needs_logits:
        return
    if not kl.has_logits:
        raise ValueError(
            f"controller={controller!r} works on logits, and kl={kl!r} has none; use TokenKL, a PolicyKL over logits, "
            "or Interpolate()"
        )
    if ranks.size > 1 and (kl.sharded or _split(optimizer)):
        raise ValueError(
            f"{controller!r} needs all control prompts and whole weights in every process; use Interpolate(), or "
            "shard=False and DistributedDataParallel"
        )


def _check_directions(kl: KLClosure, controller: Controller, optimizer: Optimizer, budget: Budget) -> None:
    """Refuse weights in pieces and a pool that lacks a slice; warn where there are no gradients, or no pool."""
    if _split(optimizer) and not kl.reduces_gradients:
        raise ValueError(
            f"{controller!r}: FSDP2 has split the weights, and {kl!r} has no gradients then; use TokenKL with "
            "shard=False, PolicyKL(..., model=), Interpolate(), or DistributedDataParallel"
        )
    if controller.pull:
        _check_pull(controller, optimizer, budget)
    if kl.opaque:  # it would have to be called
        return
    if not kl.has_gradients:
        warnings.warn(
            f"{kl!r} has no gradients, so that {controller!r} can only shorten steps, as Interpolate() does; use "
            "TokenKL or PolicyKL, or a function that returns tensors with a graph",
            stacklevel=4,
        )
        return
    pool: Any = getattr(kl, "pool", None)
    if pool is None and budget.caps_drift:
        warnings.warn(
            f"{type(kl).__name__} has no pool: {type(controller).__name__} takes its directions from the control set, "
            "and fits it. Drift on other prompts was 17 to 35 times the cap (make steering). Give it pool=, further "
            "prompts that no audit reads",
            stacklevel=4,
        )
    if pool is not None:
        _check_size(pool.prompts, getattr(kl, "prompts", 0), budget)
        missing = sorted(set(budget.limited_slices(kl.slices or ())) - set(pool.slices))
        if missing:
            raise ValueError(
                f"the budget limits slice {missing[0]!r}, of which the pool has no prompts (its slices: "
                f"{sorted(pool.slices)}): {type(controller).__name__} would have no direction for it. Give the pool "
                "some, under that name"
            )


def _check_reduced(kl: KLClosure, controller: Controller, ranks: Ranks, budget: Budget) -> None:
    """Refuse what FSDP2, whose gradients are plain means over processes, would weigh in another way than audits do."""
    if not kl.reduces_gradients or ranks.size == 1:
        return
    same = ranks.exchange(kl.replica)
    if same[0] is not None and all(other == same[0] for other in same):
        return
    sources = [source for source in (kl, getattr(kl, "pool", None)) if source is not None]
    counts = ranks.exchange([dict(source.counts or {}) for source in sources])
    if any(other != counts[0] for other in counts):
        raise ValueError(
            f"{controller!r}: under FSDP2 every process needs as many observations as the others, in all and of each "
            f"slice, and they have {counts}; give each as many, or use DistributedDataParallel"
        )
    if any(bound is not None and bound != math.inf for bound in (budget.prompt, budget.token)):
        raise ValueError(
            f"{controller!r}: under FSDP2 it cannot steer by the worst of observations that each process has for "
            "itself; leave out prompt= and token=, or use Interpolate() or DistributedDataParallel"
        )


def _check_size(pool: int, control: int, budget: Budget) -> None:
    """Warn of a pool that is smaller than the control set."""
    if budget.caps_drift and pool < control:
        warnings.warn(
            f"the pool has {pool} prompts, fewer than the {control} of the control set: directions from so few fit "
            "them. With half as many a task was hardly learned (examples/steering/counting_grid.md). Give it at least "
            "as many as the control set has, better three times as many",
            stacklevel=5,
        )


def _split(optimizer: Optimizer) -> bool:
    """Whether FSDP2 has split weights."""
    return any(shard_count(p) > 1 for group in optimizer.param_groups for p in group["params"])


def _check_pull(controller: Controller, optimizer: Optimizer, budget: Budget) -> None:
    """Refuse a pull to nowhere, and below an optimizer that compares losses: those do not know of it."""
    if not budget.caps_drift:
        raise ValueError(
            f"{controller!r}: pull=True keeps proposals near a cap on the drift, and {budget} has none; use "
            "Budget(drift=...), or pull=False"
        )
    if any(group.get("line_search_fn") is not None for group in optimizer.param_groups):
        raise ValueError(
            f"{controller!r}: the line search of {type(optimizer).__name__} compares losses, which the pull is no part "
            "of; use line_search_fn=None, or pull=False"
        )


def plain_note(name: str, value: Any) -> Any:
    """A value that every log can hold: a number, a text, a flag, or a list of these; reward and success are no lists.

    Raises:
        TypeError: anything else.
    """
    if hasattr(value, "tolist"):  # a tensor or an array
        value = (value.detach() if hasattr(value, "detach") else value).tolist()
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
    items = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, (list, tuple)) and name in ("reward", "success"):
        raise TypeError(f"note({name}={value!r:.60}) is no single number or flag; reduce it first")
    plain = [item.item() if getattr(item, "shape", None) == () else item for item in items]
    if not all(isinstance(item, (bool, int, float, str)) for item in plain):
        raise TypeError(f"note({name}={value!r:.60}) is no number, text or flag, and no list of these; reduce it first")
    return plain if isinstance(value, (list, tuple)) else plain[0]
