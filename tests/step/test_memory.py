"""What the model search remembers from one step to the next."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Interpolate, PolicyKL, Project, STEPOptimizer
from step_optim.controllers.search import largest_feasible
from tests.controllers.test_search import Problem, within_tol


def bent(at_one: float, slope: float) -> Problem:
    """K(alpha) / eps = at_one alpha² e^(2 slope (alpha - 1)): log h is a straight line of that slope."""
    return Problem([lambda alpha: at_one * alpha**2 * math.exp(2 * slope * (alpha - 1))])


def audits(slopes: list[float], *, memory: bool, at_one: float = 4.0) -> list[int]:
    """How many audits each of some searches in a row takes."""
    profile = {} if memory else None
    used = []
    for slope in slopes:
        problem = bent(at_one, slope)
        found = largest_feasible(
            problem.measure, problem.at(1.0), search="model", tol=0.01, max_trials=24, profile=profile
        )
        assert found is not None
        assert within_tol(found[0], problem.best, 0.012)
        used.append(len(problem.asked))
    return used


@pytest.mark.parametrize("slope", [-0.3, 0.2])
def test_a_bend_that_stays_is_known_after_two_searches(slope) -> None:
    """From the third search on one audit is enough; without memory it takes two every time."""
    assert audits([slope] * 5, memory=True) == [2, 2, 1, 1, 1]
    assert audits([slope] * 5, memory=False) == [2] * 5


def test_a_bend_that_comes_and_goes_misleads_nobody() -> None:
    """Slopes of changing sign are no agreement: the search costs what it costs without memory."""
    slopes = [0.3, -0.2, 0.25, -0.3, 0.2]
    assert audits(slopes, memory=True) == audits(slopes, memory=False)


@given(slopes=st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=8), at_one=st.floats(1.01, 1e4))
def test_any_history_ends_within_tol(slopes, at_one) -> None:
    """Whatever is remembered, the answer is feasible and within tol of the best."""
    assert max(audits(slopes, memory=True, at_one=at_one)) <= 8


def run(controller: Interpolate | Project, steps: int = 4, start: tuple | None = None) -> STEPOptimizer:
    """A bandit whose steps are all too large, from its start or from a checkpoint on."""
    torch.manual_seed(0)
    policy = torch.nn.Linear(4, 5)
    first = 0
    optimizer = STEPOptimizer(
        torch.optim.SGD(policy.parameters(), lr=3.0),
        kl=PolicyKL(lambda: policy(torch.eye(4)), slices={"a": [0, 1]}),
        budget=0.01,
        controller=controller,
    )
    if start is not None:
        weights, state, first = start
        policy.load_state_dict(weights)
        optimizer.load_state_dict(state)
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        for p in policy.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    optimizer.policy = policy
    return optimizer


@pytest.mark.parametrize("kind", [Interpolate, Project])
def test_it_is_part_of_a_checkpoint(kind) -> None:
    """A resumed run searches as the uninterrupted one does; an older checkpoint without a profile loads."""
    saved = run(kind(), 2)
    state = copy.deepcopy(saved.state_dict())
    assert state["step_optim"]["controller"]["profile"].keys() == {"mean"}
    weights = {name: p.clone() for name, p in saved.policy.state_dict().items()}
    whole, resumed = run(kind()), run(kind(), start=(weights, copy.deepcopy(state), 2))
    assert [t.alpha for t in resumed.last.trials] == [t.alpha for t in whole.last.trials]
    assert resumed._run.memory == whole._run.memory
    state["step_optim"]["controller"] = {}
    assert run(kind(), start=(weights, state, 2)).last.accepted.mean <= 0.01


def test_it_can_be_left_out() -> None:
    """With memory=False nothing is kept, nor is it for searches that have no use for it."""
    for controller in (Interpolate(memory=False), Interpolate(search="bisect"), Project(memory=False)):
        assert run(controller, 2)._run.memory == {}
    assert Interpolate() == Interpolate()
    assert "profile" not in repr(Interpolate())


def test_a_step_that_fails_is_not_remembered(monkeypatch) -> None:
    """An error after the search, in the rest of the step, puts the profile back with everything else."""
    optimizer = run(Interpolate(), 2)
    before = copy.deepcopy(optimizer._run.memory)
    decide = Interpolate.decide

    class Fails(RuntimeError):
        pass

    def fail(trial):
        decide(Interpolate(), trial)
        assert optimizer._run.memory != before
        raise Fails

    monkeypatch.setattr(Interpolate, "decide", lambda self, trial: fail(trial))
    for p in optimizer.policy.parameters():
        p.grad = torch.ones_like(p) * torch.linspace(-1, 1, p.numel()).view_as(p)
    with pytest.raises(Fails):
        optimizer.step()
    assert optimizer._run.memory == before


def test_audits_per_trigger_are_counted() -> None:
    """The summary has the mean and the largest number of audits beyond the candidate's."""
    optimizer = run(Interpolate())
    figures = optimizer.summary()
    assert figures["trigger_rate"] == 1.0
    assert figures["audits_per_trigger"] == figures["audits_per_step"] - 1
    assert figures["max_audits_per_trigger"] >= len(optimizer.last.trials)


@pytest.mark.parametrize(
    "damage", [None, 3, {"mean": None}, {"mean": [math.nan]}, {"mean": [1, 2, 3]}, {"mean": [1e9]}]
)
def test_a_damaged_profile_is_refused_before_anything_changes(damage) -> None:
    """The checkpoint is named as damaged; controller and counters are those before."""
    optimizer = run(Interpolate(), 2)
    state, before = map(copy.deepcopy, (optimizer.state_dict(), optimizer._run.memory))
    state["step_optim"]["controller"]["profile"] = damage
    with pytest.raises(ValueError, match="the checkpoint's entry 'step_optim' is damaged"):
        optimizer.load_state_dict(state)
    assert optimizer._run.memory == before
