"""Run a training loop bare and wrapped: all bits agree at an infinite budget, a controller acts at a finite one."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from step_optim import Action, Budget, Controller, Gate, Interpolate, PolicyKL, STEPOptimizer, StepRecord
from tests.strategies import bits

Loop = Callable[[Callable[..., Optimizer]], dict[str, Any]]
"""A training run. It is given ``wrap(optimizer, policy, **options)`` and returns whatever has to agree."""


def bare(optimizer: Optimizer, policy: Callable[[], Any], **_: Any) -> Optimizer:
    """Leave the optimizer as it is."""
    return optimizer


class Stepped:
    """Puts STEP around optimizers, and checks every record with an observer that shares nothing with the audit.

    Args:
        budget: of every optimizer that it wraps.
        controller: makes one for each of them.
    """

    def __init__(self, budget: Budget | float, controller: Callable[[], Controller] = Interpolate) -> None:
        self.budget, self.controller = budget, controller
        self.optimizers: list[STEPOptimizer] = []
        self.records: list[StepRecord] = []

    def __call__(
        self,
        optimizer: Optimizer,
        policy: Callable[[], Any],
        *,
        model: nn.Module | None = None,
        observe: bool = True,
        **options: Any,
    ) -> STEPOptimizer:
        """Wrap one optimizer of a loop; ``policy`` gives the action distributions on fixed observations."""
        observer = PolicyKL(policy, model=model) if observe else None
        fresh = True

        def before(*_: Any) -> None:
            nonlocal fresh
            if fresh and observer is not None:
                observer.anchor()
            fresh = False

        def after(plain: dict[str, Any], step: int) -> None:
            nonlocal fresh
            record = StepRecord.from_dict(plain)
            assert record.step == step
            if observer is not None and not fresh:
                check_record(record, observer)
            fresh = True
            self.records.append(record)

        wrapped = STEPOptimizer(
            optimizer,
            kl=PolicyKL(policy, model=model),
            budget=self.budget,
            controller=self.controller(),
            log=after,
            **options,
        )
        wrapped.register_step_pre_hook(before)
        self.optimizers.append(wrapped)
        return wrapped

    def actions(self) -> set[Action]:
        """What happened to the steps."""
        return {record.action for record in self.records}


def check_record(record: StepRecord, observer: PolicyKL) -> None:
    """The weights as they are now moved by what the record says, to the bit, and that is within the budget."""
    if record.action is Action.UNCHANGED:
        return  # of the weights; a forward in a loss closure may have moved running statistics
    seen = observer()
    assert seen.mean == record.accepted.mean, record
    assert seen.mean <= record.budget.mean
    if record.action is Action.REJECT:
        assert seen.mean == 0


def run(loop: Loop, wrap: Callable[..., Optimizer], seed: int = 0) -> dict[str, Any]:
    """Run a loop from the same random streams as every other time; the streams at its end are part of the result."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    result = loop(wrap)
    return result | {"rng": (bits(torch.get_rng_state()), repr(random.getstate()), repr(np.random.get_state()))}


def everything(model: nn.Module, optimizers: Optimizer | Iterable[Optimizer], **more: Any) -> dict[str, Any]:
    """All that training leaves behind, comparable between two runs: no ids, no wrapper."""
    given = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    inner = [optimizer.optimizer if isinstance(optimizer, STEPOptimizer) else optimizer for optimizer in given]
    return {
        "parameters": bits(dict(model.named_parameters())),
        "buffers": bits(dict(model.named_buffers())),
        "gradients": [bits(p.grad) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "state": [bits(optimizer.state_dict()["state"]) for optimizer in inner],
        "groups": [bits(optimizer.state_dict()["param_groups"]) for optimizer in inner],
        **{name: bits(value) for name, value in more.items()},
    }


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of what does not agree."""
    return [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]


def check_transparent(loop: Loop, stepped: type[Stepped] = Stepped, **options: Any) -> Stepped:
    """At an infinite budget nothing tells the wrapped run from the bare one, although every step was measured."""
    alone = run(loop, bare)
    measured = stepped(Budget(mean=math.inf), **options)
    assert differing(run(loop, measured), alone) == []
    assert differing(run(loop, bare), alone) == []  # otherwise the comparison says nothing
    assert measured.optimizers
    assert measured.records
    assert measured.actions() <= {Action.COMMIT, Action.UNCHANGED}
    assert any(record.candidate.mean > 0 for record in measured.records)
    return measured


def check_acting(
    loop: Loop,
    budget: float,
    controller: Callable[[], Controller],
    action: Action,
    stepped: type[Stepped] = Stepped,
) -> Stepped:
    """At a finite budget the controller acts, and nothing over budget was committed (`check_record`)."""
    held = stepped(Budget(mean=budget), controller)
    run(loop, held)
    assert action in held.actions()
    assert all(record.triggered == (record.candidate.mean > budget) for record in held.records)
    assert all(record.success and record.error is None for record in held.records)
    return held


def check_host(loop: Loop, stepped: type[Stepped] = Stepped) -> tuple[Stepped, Stepped, Stepped]:
    """All that a host has to show: measured only, shrunk to half the typical movement, and rejected at zero."""
    measured = check_transparent(loop, stepped)
    budget = statistics.median(r.candidate.mean for r in measured.records if r.candidate.mean > 0) / 2
    shrunk = check_acting(loop, budget, Interpolate, Action.SHRINK, stepped)
    rejected = check_acting(loop, 0.0, Gate, Action.REJECT, stepped)
    assert rejected.actions() <= {Action.REJECT, Action.UNCHANGED}
    return measured, shrunk, rejected
