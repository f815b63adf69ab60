"""Short runs with a recorder, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step_optim import STEPOptimizer
from step_optim.flight import FlightRecorder
from tests.strategies import Problem, bits, picture, policy_problem, wrap

Between = Callable[[STEPOptimizer, int], Any]


def recorded(folder: Path, *, when: str = "always", budget: Any = 1e-3, controller: Any = None, **options: Any) -> Any:
    """A problem and an optimizer whose steps are kept."""
    problem = policy_problem(**{name: options.pop(name) for name in ("inner", "lr", "dtype") if name in options})
    problem.model.norm.momentum = 0.0  # else training forwards move the policy, and no kept step has its statistics
    recorder = FlightRecorder(folder, when=when, **{k: options.pop(k) for k in ("max_bytes",) if k in options})
    return problem, wrap(problem, budget, controller, recorder=recorder, **options)


def train(problem: Problem, optimizer: STEPOptimizer, steps: Any, between: Between | None = None) -> list[Any]:
    """Take some steps, and do something after each of them that must leave no trace; see `outcome`."""
    seen = []
    for step in steps if not isinstance(steps, int) else range(steps):
        problem.backward(step)
        optimizer.step()
        seen.append(outcome(problem, optimizer))
        if between is not None:
            before = picture(problem.model, optimizer), optimizer.state_dict()["step_optim"]
            between(optimizer, step)
            after = picture(problem.model, optimizer), optimizer.state_dict()["step_optim"]
            assert bits(after) == bits(before), "it left a trace"
    return seen


def outcome(problem: Problem, optimizer: STEPOptimizer) -> dict[str, Any]:
    """All that there is to compare with another run after a step."""
    whole = picture(problem.model, optimizer, rng=False)
    whole["gradients"] = [None if p.grad is None else bits(p.grad) for p in problem.model.parameters()]
    whole["state"] = bits(list(optimizer.state.values()))
    del whole["state objects"]
    return whole | {"record": story(optimizer), "torch": bits(torch.get_rng_state())}


def story(optimizer: STEPOptimizer) -> dict[str, Any]:
    """The latest record without its times."""
    assert optimizer.last is not None
    return optimizer.last.to_dict() | {"seconds": None}


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit, in shape and dtype too."""
    return bits(list(a)) == bits(list(b))
