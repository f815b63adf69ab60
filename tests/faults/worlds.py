"""Runs that a fault hits: small problems under every way in which a step can end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from step_optim import Budget, Gate, Interpolate, PolicyKL, Project, Steer, STEPOptimizer
from step_optim.budget import AutoBudget
from step_optim.precision import student_quantile
from tests.strategies import Policy, Problem, policy_problem, token_problem

WARM = 1
"""Steps before the one with the fault, unless the scenario is about the first."""


@dataclass
class World:
    """A run that can be built again, bit for bit: `prepare` makes a gradient, `act` takes the step."""

    problem: Problem
    optimizer: STEPOptimizer
    log: Path
    act: Callable[[int], None]
    before: Callable[[], None] = lambda: None
    """Before every step, outside of it."""
    draws: bool = False
    """The user's own code draws random numbers during the step: no rollback can rewind those."""
    warm: int = WARM

    def prepare(self, step: int) -> None:
        """All that comes before `act`."""
        if self.draws:
            torch.manual_seed(1000 + step)
        self.problem.backward(step)
        self.before()
        self.optimizer.note(reward=float(step), tag=f"step {step}")

    def step(self, step: int) -> None:
        """Make one undisturbed step."""
        self.prepare(step)
        self.act(step)


class Follower(torch.optim.Optimizer):
    """Keeps a second copy of the weights, as schedule-free optimizers do, and a tensor that all parameters share."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr, "seen": 0})
        self.shared, self.history = torch.zeros(1), [0.0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move z along the gradient, and the weights half way to z."""
        loss = None if closure is None else closure()
        self.shared += 1
        self.history.append(float(self.shared))
        for group in self.param_groups:
            group["seen"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["z"], state["count"] = p.clone(), self.shared
                    state["z"] -= group["lr"] * p.grad.sign()
                    p.lerp_(state["z"], 0.5)
        return loss


def _world(
    problem: Problem, folder: Path, budget: Budget | float, controller: Any = None, warm: int = WARM, **options: Any
) -> World:
    log = folder / "run.jsonl"
    optimizer = STEPOptimizer(
        problem.optimizer, kl=problem.kl, budget=budget, controller=controller, log=log, **options
    )
    return World(problem, optimizer, log, lambda step: optimizer.step(), warm=warm)


def _with_closure(world: World) -> World:
    """Hand the loss closure to the step."""
    problem = world.problem

    def act(step: int) -> None:
        def closure() -> Tensor:
            problem.optimizer.zero_grad()
            loss = problem.loss(step)
            loss.backward()
            return loss

        world.optimizer.step(closure)

    world.act, world.draws = act, True
    return world


def _windowed(world: World) -> World:
    """Make two inner steps one candidate."""

    def act(step: int) -> None:
        with world.optimizer.window():
            for part in range(2):
                world.problem.backward(10 * step + part)
                world.optimizer.step()

    world.act, world.draws = act, True
    return world


def _function(seed: int) -> tuple[Problem, Callable[[], None]]:
    """A policy with dropout and BatchNorm under a plain function, which keeps its own reference."""
    torch.manual_seed(seed)
    model, observations, data = Policy(), torch.randn(6, 5), torch.randn(64, 7, 5)
    reference: list[Tensor] = []

    def take() -> None:
        model.eval()
        with torch.no_grad():
            reference[:] = [model(observations).log_softmax(-1)]
        model.train()

    def kl() -> dict[str, Tensor]:
        now = model(observations).log_softmax(-1)
        each = (now.exp() * (now - reference[0])).sum(-1).clamp_min(0)
        return {"mean": each.mean(), "a": each[:3].mean()}

    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    return Problem(model, inner, kl, lambda step: data[step % 64]), take  # type: ignore[arg-type]


def _plain(folder: Path) -> World:
    problem, take = _function(3)
    world = _world(problem, folder, Budget(mean=1e-3, slices={"a": 1e-3}))
    world.before = take
    return world


def _followed(folder: Path, controller: Any) -> World:
    problem = policy_problem(7)
    problem.optimizer = Follower(problem.model.parameters(), lr=0.05)
    return _world(problem, folder, 1e-4, controller, param_like="z")


def _steered(folder: Path) -> World:
    """A cap that the first steps reach, with a pool; models of it are remembered."""
    problem = policy_problem(16)
    model, observations, others = problem.model, torch.randn(6, 5), torch.randn(4, 5)
    problem.kl = PolicyKL(lambda: model(observations), noise_floor=False, pool=lambda: model(others))
    return _world(problem, folder, Budget(mean=1e-3, drift=1e-4), Steer(corrections=2))


def _watched(folder: Path) -> World:
    """Held-out observations at every step, beside budgets for the worst one and with confidence."""
    problem = policy_problem(17)
    model, observations, others = problem.model, torch.randn(6, 5), torch.randn(5, 5)
    held_out = {"held_out": lambda: model(others), "every": 1}
    problem.kl = PolicyKL(lambda: model(observations), noise_floor=False, **held_out)
    return _world(problem, folder, Budget(mean=1e-4, prompt=2e-4, confidence=0.9))


class _WithValue(nn.Module):
    """A policy, and a value head beside it that no policy reads."""

    def __init__(self) -> None:
        super().__init__()
        self.policy, self.value = Policy(), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.policy(x), self.value(x)], -1)


def _partial(folder: Path, controller: Any = None, *, inner: Any = None, keep: Any = "unread", **options: Any) -> World:
    """What the policy does not read keeps its whole step."""
    torch.manual_seed(19)
    model, observations, data = _WithValue(), torch.randn(6, 5), torch.randn(64, 7, 5)
    groups = [{"params": list(part.parameters())} for part in (model.policy, model.value)]
    kl = PolicyKL(lambda: model.policy(observations), noise_floor=False)
    optimizer = torch.optim.AdamW(groups, lr=0.05) if inner is None else inner(groups)
    problem = Problem(model, optimizer, kl, lambda step: data[step % 64])
    return _world(problem, folder, 1e-4, controller, keep=keep, **options)


def _partial_schedule_free(folder: Path) -> World:
    schedulefree = pytest.importorskip("schedulefree")

    def inner(groups: Any) -> Any:
        optimizer = schedulefree.AdamWScheduleFree(groups, lr=0.05)
        optimizer.train()
        return optimizer

    return _partial(folder, Gate(), inner=inner)


def _gaussian(folder: Path) -> World:
    """A policy that is a distribution object."""
    problem = policy_problem(8)
    model, observations = problem.model, torch.randn(6, 5)
    problem.kl = PolicyKL(lambda: torch.distributions.Normal(model(observations), model.scalar.exp()))
    return _world(problem, folder, 1e-3)


def _schedule_free(folder: Path) -> World:
    schedulefree = pytest.importorskip("schedulefree")
    problem = policy_problem(10)
    problem.optimizer = schedulefree.AdamWScheduleFree(problem.model.parameters(), lr=0.05)
    problem.optimizer.train()
    return _world(problem, folder, 1e-4)


SCENARIOS: dict[str, Callable[[Path], World]] = {
    "commit": lambda folder: _world(policy_problem(1), folder, 1e3),
    "commit tokens": lambda folder: _world(token_problem(1), folder, Budget(mean=1e3, reference=1e3)),
    "first commit": lambda folder: _world(policy_problem(2), folder, 1e3, warm=0),
    "first reject": lambda folder: _world(token_problem(2), folder, 1e-9, Gate(), warm=0),
    "unchanged": lambda folder: _world(policy_problem(1, lr=0.0), folder, 1e3),
    "reject": lambda folder: _world(token_problem(3), folder, 1e-9, Gate()),
    "keep_state": lambda folder: _world(policy_problem(4), folder, 1e-9, Gate(on_reject="keep_state")),
    "shrink": lambda folder: _world(token_problem(5), folder, Budget(mean=1e-4, slices=2e-4), Interpolate()),
    "shrink policy": lambda folder: _world(policy_problem(5), folder, 1e-4),
    "on_shrink": lambda folder: _world(policy_problem(5), folder, 1e-4, Interpolate(on_shrink="restore")),
    "project": lambda folder: _world(token_problem(6), folder, Budget(mean=1e-4, slices=2e-4), Project(steps=1)),
    "steer": _steered,
    "held out": _watched,
    "automatic budget": lambda folder: _world(policy_problem(18), folder, AutoBudget(2, 0.5, Budget(1e-4))),
    "window": lambda folder: _windowed(_world(policy_problem(6), folder, 1e-4)),
    "loss closure": lambda folder: _with_closure(_world(policy_problem(7), folder, 1e-4)),
    "copies": lambda folder: _followed(folder, Interpolate()),
    "copies on_shrink": lambda folder: _followed(folder, Interpolate(on_shrink="restore")),
    "copies keep_state": lambda folder: _followed(folder, Gate(on_reject="keep_state")),
    "on_error": lambda folder: _world(policy_problem(9), folder, 1e-4, on_error="reject"),
    "bf16": lambda folder: _world(policy_problem(11, dtype="bf16"), folder, 1e-4),
    "SGD": lambda folder: _world(policy_problem(12, inner="SGD"), folder, 1e-9, Gate()),
    "NAdam": lambda folder: _world(token_problem(13, inner="NAdam"), folder, 1e-4, Interpolate("bisect")),
    "ASGD": lambda folder: _world(policy_problem(14, inner="ASGD"), folder, 1e-9, Gate(patience=1)),
    "tensor lr": lambda folder: _world(policy_problem(15, inner="tensor lr"), folder, 1e-4),
    "schedule-free": _schedule_free,
    "plain function": _plain,
    "partial reject": lambda folder: _partial(folder, Gate()),
    "partial first": lambda folder: _partial(folder, Gate(), warm=0),
    "partial shrink": lambda folder: _partial(folder, Interpolate(on_shrink="restore")),
    "partial window": lambda folder: _windowed(_partial(folder, Gate(on_reject="keep_state"))),
    "partial schedule-free": _partial_schedule_free,
    "distribution": _gaussian,
}


def build(scenario: str, folder: Path, *, fresh: bool = True) -> World:
    """Build a run, from its start unless its log is there to be gone on with."""
    folder.mkdir(parents=True, exist_ok=True)
    student_quantile.cache_clear()  # every run goes through the same lines
    if fresh:
        (folder / "run.jsonl").unlink(missing_ok=True)
    return SCENARIOS[scenario](folder)
