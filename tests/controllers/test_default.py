"""The controller that nobody named: Steer at a cap with a pool, Interpolate otherwise."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from step_optim import Budget, Gate, Interpolate, PolicyKL, Steer, STEPOptimizer
from tests.controllers.test_steer import INPUTS, World


def wrapped(world: World, budget: Budget, **options: object) -> STEPOptimizer:
    return STEPOptimizer(torch.optim.Adam(world.layer.parameters(), lr=0.1), budget=budget, **options)


@pytest.mark.parametrize(
    ("budget", "pool", "kind"),
    [
        (Budget(drift=0.01), True, Steer),
        (Budget(drift_slices={"a": 0.01}), True, Steer),
        (Budget(drift=lambda step: 0.01), True, Steer),
        (Budget(drift=0.01), False, Interpolate),
        (Budget(mean=0.01), True, Interpolate),
    ],
)
def test_the_default_follows_budget_and_pool(budget, pool, kind) -> None:
    """At construction, or when the KL closure is bound."""
    world = World(pool=pool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody is told of a pool that is missing who did not ask for Steer
        warnings.filterwarnings("ignore", message="the budget limits slices of few prompts")
        early = wrapped(world, budget, kl=world.kl)
        late = wrapped(world, budget)
        late.bind(world.kl)
    assert type(early.controller) is type(late.controller) is kind


def test_what_was_named_stays() -> None:
    world = World()
    optimizer = wrapped(world, Budget(drift=0.01), kl=world.kl, controller=Gate())
    optimizer.set_budget(Budget(mean=0.1))
    assert isinstance(optimizer.controller, Gate)
    optimizer.controller = Interpolate()
    optimizer.set_budget(Budget(drift=0.01))
    assert isinstance(optimizer.controller, Interpolate)


def test_another_budget_or_closure_may_change_it() -> None:
    world = World()
    optimizer = wrapped(world, Budget(mean=0.1))
    optimizer.bind(world.kl)
    assert isinstance(optimizer.controller, Interpolate)
    optimizer.set_budget(Budget(drift=0.01))
    assert isinstance(optimizer.controller, Steer)
    chosen = optimizer.controller
    optimizer.set_budget(Budget(drift=0.02))
    assert optimizer.controller is chosen


def test_a_default_is_resumed_to_the_bit_also_when_the_closure_comes_last() -> None:
    world, other = World(3), World(3)
    optimizer = wrapped(world, Budget(drift=0.01), kl=world.kl)
    for _ in range(5):
        world.step(optimizer)
    saved = copy.deepcopy((world.layer.state_dict(), optimizer.state_dict()))
    for _ in range(5):
        world.step(optimizer)
    resumed = wrapped(other, Budget(drift=0.01))
    other.layer.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    resumed.bind(other.kl)
    for _ in range(5):
        other.step(resumed)
    assert optimizer.summary()["steers"] == resumed.summary()["steers"] > 0
    assert all(torch.equal(a, b) for a, b in zip(world.layer.parameters(), other.layer.parameters(), strict=True))


def test_a_new_control_set_under_a_cap_says_that_the_drift_begins_anew() -> None:
    """Not without a cap, and not of a closure that has its pi_ref already."""
    world = World(4)
    optimizer = wrapped(world, Budget(drift=0.01), kl=world.kl)
    for _ in range(3):
        world.step(optimizer)
    with pytest.warns(UserWarning, match=r"bind\(\): PolicyKL has no pi_ref yet.*drifted 0\.0"):
        optimizer.bind(PolicyKL(lambda: world.layer(INPUTS), noise_floor=False))
    known = PolicyKL(lambda: world.layer(INPUTS), noise_floor=False)
    known.anchor()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.step(optimizer)
        optimizer.bind(known)
        optimizer.set_budget(Budget(mean=0.1))
        optimizer.bind(PolicyKL(lambda: world.layer(INPUTS), noise_floor=False))
