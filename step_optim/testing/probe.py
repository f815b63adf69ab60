"""A small training run, the same every time, in which an optimizer is tried bare or wrapped."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from step_optim.audit.closure import Audit, KLClosure
from step_optim.controllers import Action, Gate
from step_optim.movement import Movement
from step_optim.optimizer import STEPOptimizer
from step_optim.snapshot.tensors import same_bits
from step_optim.testing.picture import Picture

Factory = Callable[[list[nn.Parameter]], Optimizer]
"""Makes the optimizer under test for a list of parameters: two matrices and a vector."""

TrainStep = Callable[[Any, Callable[[], Tensor]], None]
"""Trains one step: (optimizer, loss) -> None."""


def train_step(optimizer: Any, loss: Callable[[], Tensor]) -> None:
    """Train one step the usual way; `check_optimizer` takes another function for optimizers that need more.

    Args:
        optimizer: the bare optimizer, or the `STEPOptimizer` around it.
        loss: computes the loss of this step's batch; backward is the function's to call.
    """
    if hasattr(optimizer, "train"):  # schedule-free optimizers have modes
        optimizer.train()
    optimizer.zero_grad()
    loss().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@dataclass(frozen=True)
class Setup:
    """What is the same in all runs of one check."""

    factory: Factory
    dtype: torch.dtype
    train_step: TrainStep


class Net(nn.Module):
    """Two matrices, large enough to be quantized by 8-bit optimizers, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 80)
        self.out = nn.Linear(80, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, 64]."""
        out: Tensor = self.out(torch.tanh(self.hidden(x)))
        return out


class Switch(KLClosure):
    """Over budget at its next audit once it is armed."""

    armed = False

    def audit(self) -> Audit:
        """Read 1, over the budget, if armed; else 0."""
        armed, self.armed = self.armed, False
        return Audit(Movement(float(armed)))


class Probe:
    """A model in training.

    Args:
        setup: what to train it with.
        options: of the `STEPOptimizer` to put around the optimizer; None trains the bare one.
    """

    def __init__(self, setup: Setup, options: dict[str, Any] | None = None) -> None:
        _seed(0)
        self.setup = setup
        self.net = Net().to(setup.dtype)
        self.parameters = list(self.net.parameters())
        self.inner = setup.factory(list(self.parameters))
        groups = getattr(self.inner, "param_groups", [])  # what has none is refused later
        trained = {id(p) for group in groups for p in group["params"]}
        for p in self.parameters:
            p.requires_grad_(id(p) in trained or not trained & set(map(id, self.parameters)))
        self.switch = Switch()
        self.optimizer = self.inner
        if options is not None:
            given: dict[str, Any] = {"budget": 0.5, "controller": Gate()} | options
            self.optimizer = STEPOptimizer(self.inner, self.switch, **given)

    def train(self, seed: int, *, quiet: bool = False) -> None:
        """Train one step on the batch of this seed; a quiet one has zero gradients."""
        # An optimizer may draw random numbers, also while a loss closure runs: a function of the step, not of the past.
        _seed(seed)
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)).to(self.setup.dtype)
        y = x.argmax(-1)  # something to learn: where gradients do not agree, TRAC does not move

        def loss() -> Tensor:
            value = nn.functional.cross_entropy(self.net(x).float(), y)
            return value * 0.0 if quiet else value

        self.setup.train_step(self.optimizer, loss)

    def train_all(self, seeds: Iterable[int]) -> Probe:
        """Train a step for each seed."""
        for seed in seeds:
            self.train(seed)
        return self

    def over_budget(self, seed: int) -> Action:
        """Train a step whose candidate is over the budget; it may still commit, if it moves nothing."""
        assert isinstance(self.optimizer, STEPOptimizer)
        before = self.optimizer.last
        self.switch.armed = True
        self.train(seed)
        self.switch.armed = False
        if self.optimizer.last is None or self.optimizer.last is before:
            raise RuntimeError("the training step did not call optimizer.step()")
        return self.optimizer.last.action

    def reject(self, seed: int) -> tuple[Action, str]:
        """Train a step that is over the budget, and look for traces of it."""
        start = [p.detach().clone() for p in self.parameters]
        seen: list[Picture] = []
        still: list[bool] = []
        hooks = [
            self.optimizer.register_step_pre_hook(lambda *_: still.append(self._is_at(start))),
            self.optimizer.register_step_pre_hook(lambda *_: seen.append(self.picture())),
            self.optimizer.register_step_post_hook(lambda *_: seen.append(self.picture())),
        ]
        action = self.over_budget(seed)
        for hook in hooks:
            hook.remove()
        if not still[0]:
            return action, "weights move outside step()"
        return action, seen[0].difference(seen[-1], objects=True) if action is Action.REJECT else ""

    def _is_at(self, weights: list[Tensor]) -> Any:
        return all(same_bits(p, q) for p, q in zip(self.parameters, weights, strict=True))

    def picture(self) -> Picture:
        """All that the optimizer holds now."""
        return Picture(self.inner, self.parameters)

    @property
    def weights(self) -> Tensor:
        """All weights as one float64 vector."""
        return torch.cat([p.detach().double().flatten() for p in self.parameters])

    @torch.no_grad()
    def write(self, weights: Tensor) -> None:
        """Write weights in place, and leave all state as it is."""
        parts = torch.split(weights, [p.numel() for p in self.parameters])
        for p, values in zip(self.parameters, parts, strict=True):
            p.copy_(values.view_as(p))


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats tracebacks, for generators not in use here
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def brief(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()):.150}"
