"""Warm start: proposals at the learning rate that the last ones have shown to be within the budget."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from step_optim import Action, Budget, Gate, Interpolate, Movement, STEPOptimizer, StepRecord
from step_optim.budget import Limits
from step_optim.step.radius import AIM, CHANGE, next_scale

SCALES = st.floats(1e-6, 1.0)
KLS = st.floats(0.0, 1e6)


def record(kl: float, budget: float = 1.0, action: Action = Action.SHRINK) -> StepRecord:
    return StepRecord(0, action, Movement(kl), Movement(0.0), Limits(mean=budget))


@given(SCALES, KLS, st.floats(1e-9, 1e3))
def test_the_scale_stays_in_range_and_changes_slowly(scale, kl, budget):
    """Whatever was measured, the scale is in (0, 1] and at most halved or doubled."""
    new = next_scale(scale, record(kl, budget))
    assert 0 < new <= 1
    assert scale / CHANGE * 0.999999 <= new <= scale * CHANGE


@given(SCALES, st.floats(0.0, 1e3), st.floats(0.0, 1e3))
def test_a_larger_movement_never_gives_a_larger_scale(scale, a, b):
    small, large = sorted((a, b))
    assert next_scale(scale, record(large)) <= next_scale(scale, record(small))


@given(st.floats(1e-2, 1e4))
def test_where_kl_is_a_parabola_proposals_settle_at_the_aim(whole):
    """K = whole * scale²: after enough steps a proposal uses AIM of the budget, or the whole rate if that is less."""
    scale = 1.0
    for _ in range(40):
        scale = next_scale(scale, record(whole * scale**2))
    assert whole * scale**2 == pytest.approx(min(AIM, whole), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_movement_that_is_not_finite_halves_it(bad):
    assert next_scale(0.5, record(bad)) == 0.25


def test_what_tells_nothing_is_left_out():
    """Infinite budgets, steps that moved nothing, and a cap whose drift before the step is not known."""
    assert next_scale(0.5, StepRecord(0, Action.COMMIT, Movement(9.0), Movement(9.0), Limits(mean=math.inf))) == 0.5
    assert next_scale(0.5, record(0.0, action=Action.UNCHANGED)) == 0.5
    capped = StepRecord(
        0, Action.REJECT, Movement(0.0), Movement(0.0), Limits(drift=0.04), candidate_drift=Movement(1.0)
    )
    assert next_scale(0.5, capped) == 0.5


def test_a_cap_leaves_the_room_that_there_is():
    """sqrt(drift) grows like the rate from what theta_t has; a cap alone does not bring the scale below 1/16."""

    def after(drift: float, before: float, scale: float = 0.5) -> float:
        limits = Limits(drift=0.04)
        drifts = {"previous_drift": Movement(before), "candidate_drift": Movement(drift)}
        return next_scale(scale, StepRecord(0, Action.SHRINK, Movement(0.0), Movement(0.0), limits, **drifts))

    room = (math.sqrt(0.01 + 0.8 * 0.03) - 0.1) / (0.25 - 0.1)
    assert after(0.0625, before=0.01) == pytest.approx(0.5 * room)
    assert after(0.5, before=0.01) == 0.25  # at most halved
    assert after(0.5, before=0.04) == 0.25
    assert after(0.5, before=0.04, scale=0.08) == 1 / 16
    assert after(0.5, before=0.04, scale=0.02) == 0.02
    assert after(0.02, before=0.03) == 1.0  # on the way back


def by_slice(gradient: float | None) -> tuple[STEPOptimizer, nn.Parameter]:
    """A plain function that reports a slice; only the budget knows its name before it is called."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        kl=lambda: {"a": weight.detach().abs().sum()},
        budget=Budget(slices={"a": 0.1}),
        controller=Gate(),
        adaptive_rate=True,
    )
    weight.grad = None if gradient is None else torch.tensor([gradient])
    return optimizer, weight


@pytest.mark.parametrize("gradient", [None, 0.0, math.nan, math.inf])
def test_a_step_that_measured_no_slice_is_a_step_like_any_other(gradient):
    """Nothing moved, or nothing was finite: the next step is audited, under the budget that names a slice."""
    optimizer, weight = by_slice(gradient)
    with pytest.warns(UserWarning, match="none of the optimizer's 1") if gradient is None else nullcontext():
        optimizer.step()
    weight.grad = torch.tensor([5.0])
    optimizer.step()
    assert optimizer.last.triggered
    assert optimizer.last.action is Action.REJECT
    assert optimizer.last.scale == (1.0 if not gradient else 0.5)  # an update that is not finite halves it
    assert weight.item() == 0.0


def test_what_the_user_calls_a_failure_does_not_stop_it():
    """`note(success=False)` is about the episode; the proposal was measured all the same."""
    optimizer, weight = by_slice(-1.0)
    for _ in range(7):
        optimizer.note(success=False)
        optimizer.step()
    assert not optimizer.last.success
    assert optimizer.last.scale < 0.2
    assert 0 < weight.item() <= 0.1


def problem(controller=None, budget=1e-3, lr=0.3, **options):
    """Adam on a softmax policy whose gradients are all alike: every proposal moves it equally far."""
    torch.manual_seed(0)
    policy = nn.Linear(3, 4)
    observations = torch.randn(20, 3)
    reference = [policy(observations).log_softmax(-1).detach()]

    def kl():
        now = policy(observations).log_softmax(-1)
        return (now.exp() * (now - reference[0])).sum(-1).mean().clamp_min(0)

    optimizer = STEPOptimizer(
        torch.optim.Adam(policy.parameters(), lr=lr), kl=kl, budget=budget, controller=controller, **options
    )

    def step():
        reference[0] = policy(observations).log_softmax(-1).detach()
        optimizer.zero_grad()
        policy(observations)[:, 0].mean().neg().backward()
        optimizer.step()
        return optimizer.last

    return policy, optimizer, step


def test_a_gate_that_rejects_for_ever_comes_free():
    """Adam's step does not depend on the gradient's size: a gate alone never accepts, and a warm start soon does."""
    _, _, step = problem(Gate())
    with pytest.warns(UserWarning, match="5 steps in a row were rejected, by the budget of the mean"):
        assert {step().action for _ in range(20)} == {Action.REJECT}
    _, optimizer, step = problem(Gate(), adaptive_rate=True)
    actions = [step().action for _ in range(20)]
    free = actions.index(Action.COMMIT)
    assert free <= math.log2(0.3 / 1e-3)
    assert actions[free:].count(Action.REJECT) <= 3
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_fewer_steps_are_shrunk():
    """Interpolation acts on every step of a run whose rate is far too high; with a warm start on few."""
    counts = {}
    for warm in (False, True):
        _, _, step = problem(Interpolate(), adaptive_rate=warm)
        records = [step() for _ in range(20)]
        assert all(r.accepted.mean <= 1e-3 for r in records)
        counts[warm] = sum(r.triggered for r in records)
    assert counts[False] == 20
    assert counts[True] <= 10


def test_the_record_tells_the_scale_and_the_rate_that_is_set():
    _, _, step = problem(adaptive_rate=True)
    first, second = step(), step()
    assert (first.scale, first.lr) == (1.0, (0.3,))
    assert second.scale == next_scale(1.0, first) < 1
    assert second.lr == (0.3,)
    assert StepRecord.from_dict(second.to_dict()) == second


def test_a_proposal_is_what_the_optimizer_makes_of_the_smaller_rate():
    _, optimizer, step = problem(Gate(), adaptive_rate=True)
    assert step().action is Action.REJECT  # so that the next step begins where this one did
    _, _, bare = problem(budget=math.inf, lr=0.3 * optimizer._run.progress.scale)
    assert step().update_norm == bare().update_norm


def test_an_infinite_budget_changes_no_bit():
    runs = []
    for options in ({"adaptive_rate": True}, {}):
        policy, _, step = problem(budget=math.inf, **options)
        for _ in range(4):
            step()
        runs.append(policy.weight.detach().clone())
    assert torch.equal(*runs)


def test_the_rate_is_put_back_after_every_step():
    """Also after an exception, in which nothing is learned about the scale."""
    _, optimizer, step = problem(adaptive_rate=True)
    step()
    scale = optimizer._run.progress.scale
    assert scale < 1

    def broken():
        assert optimizer.optimizer.param_groups[0]["lr"] == 0.3
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(kl=broken)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer._run.progress.scale == scale


def test_a_resumed_run_goes_on_with_its_scale():
    policy, optimizer, step = problem(adaptive_rate=True)
    for _ in range(3):
        step()
    saved = copy.deepcopy(optimizer.state_dict())  # it shares the moments with the optimizer
    weights = [p.detach().clone() for p in policy.parameters()]
    expected = [step().to_dict() | {"seconds": None} for _ in range(3)]
    policy, optimizer, step = problem(adaptive_rate=True)
    with torch.no_grad():
        for p, w in zip(policy.parameters(), weights, strict=True):
            p.copy_(w)
    optimizer.load_state_dict(saved)
    assert [step().to_dict() | {"seconds": None} for _ in range(3)] == expected


def test_a_checkpoint_with_a_damaged_scale_is_refused():
    _, optimizer, step = problem(adaptive_rate=True)
    step()
    saved = copy.deepcopy(optimizer.state_dict())
    for bad in (0.0, -1.0, 2.0, math.nan, "x"):
        saved["step_optim"]["scale"] = bad
        with pytest.raises(ValueError, match="scale"):
            optimizer.load_state_dict(saved)


def test_a_checkpoint_without_a_scale_begins_with_the_whole_rate():
    _, optimizer, step = problem()
    step()
    _, warm, _ = problem(adaptive_rate=True)
    warm.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert warm._run.progress.scale == 1.0
    assert "scale" not in optimizer.state_dict()["step_optim"]


def test_an_optimizer_without_a_rate_is_refused():
    class Rateless(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=1.0)
            del self.param_groups[0]["lr"]

    with pytest.raises(ValueError, match="adaptive_rate=True scales the learning rate"):
        STEPOptimizer(Rateless([nn.Parameter(torch.zeros(1))]), kl=lambda: 0.0, budget=Budget(1.0), adaptive_rate=True)


def test_warm_start_is_its_former_name() -> None:
    """Both names make the same run."""
    scales = []
    for name in ("adaptive_rate", "warm_start"):
        _, optimizer, step = problem(**{name: True})
        step()
        scales.append(optimizer.last.alpha)
        step()
        scales.append(optimizer.last.scale)
    assert scales[:2] == scales[2:]
    assert scales[1] < 1
