"""Measuring a kept step again: the right figures, and no trace of it."""

from __future__ import annotations

import copy
import functools
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from step_optim import Budget, ControlSet, Gate, Interpolate, PolicyKL, Steer, STEPOptimizer, TokenKL
from step_optim.flight import FlightRecorder, read_flight
from step_optim.flight.remeasure import checked_alphas
from tests.faults.lines import Tracer
from tests.faults.worlds import Follower
from tests.flight.runs import recorded, train
from tests.strategies import DTYPES, INNER, bits, budgets, controllers, picture, policy_problem, token_problem, wrap

# -- the figures ------------------------------------------------------------------------------------------------------


def kl_by_hand(model: nn.Module, observations: torch.Tensor, previous: list, values: list) -> float:
    """Mean over observations of KL(now ‖ previous), in float64."""
    wide, logs = copy.deepcopy(model).double(), []
    for at in (values, previous):
        for parameter, value in zip(wide.parameters(), at, strict=True):
            parameter.data = value.double()
        logs.append(wide(observations.double()).log_softmax(-1).detach())
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@pytest.mark.parametrize("controller", [Interpolate(), Gate()])
def test_trials_are_what_brute_force_finds(tmp_path, controller):
    """At any alpha, of a kept step from which the run has long gone on; whether it was feasible."""
    torch.manual_seed(0)
    model, observations = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(5, 4)
    optimizer = STEPOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.1),
        kl=PolicyKL(lambda: model(observations), {"a": [0]}),
        budget=0.01,
        controller=controller,
        recorder=tmp_path,
    )
    for _ in range(4):
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for kept in read_flight(tmp_path):
        alphas = [0.0, 0.3, 0.9, 1.0]
        record = optimizer.remeasure(kept, alphas)
        assert record.trials[: len(kept.record.trials)] == kept.record.trials
        for alpha, trial in zip(alphas, record.trials[-4:], strict=True):
            values = [torch.lerp(a, b, alpha) for a, b in zip(kept.previous, kept.candidate, strict=True)]
            expected = kl_by_hand(model, observations, kept.previous, values)
            assert trial.movement.mean == pytest.approx(expected, rel=1e-4, abs=1e-9)
            assert (trial.alpha, trial.feasible) == (alpha, trial.movement.mean <= 0.01)
        assert record.trials[-1].movement == kept.record.candidate


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "controller",
    [Interpolate(), Interpolate(search="bisect"), Interpolate(by_layer=lambda name: 3.0 if "head" in name else 1.0)],
)
def test_the_trials_of_the_step_are_found_again_bit_for_bit(tmp_path, controller, dtype):
    """Also where rounding moves points, and where the controller went by another way."""
    problem, optimizer = recorded(tmp_path, controller=controller, budget=3e-4, dtype=dtype)
    train(problem, optimizer, 4)
    steps = [kept for kept in read_flight(tmp_path) if kept.record.trials]
    assert steps
    for kept in steps:
        own = kept.record.trials
        record = optimizer.remeasure(kept, [trial.alpha for trial in own])
        assert record.trials == (*own, *own)


def test_drift_is_judged_from_the_pi_ref_of_the_run(tmp_path):
    """With a cap: what is beyond it is infeasible, and a cap that theta_t exceeded asks for less than before."""
    problem, optimizer = recorded(tmp_path, budget=Budget(mean=1e-2, drift=2e-3), controller=Interpolate())
    train(problem, optimizer, 5)
    for kept in read_flight(tmp_path):
        own = kept.record.trials
        assert optimizer.remeasure(kept, [*(trial.alpha for trial in own), 0.0]).trials[len(own) : -1] == own
    assert any(kept.record.bound == "drift" for kept in read_flight(tmp_path))


def test_what_is_not_finite_is_not_measured(tmp_path):
    """The candidate reads NaN and is infeasible; theta_t itself reads 0."""
    problem, optimizer = recorded(tmp_path)
    problem.backward(0)
    problem.model.head.weight.grad[0, 0] = math.nan
    optimizer.step()
    half, still = optimizer.remeasure(None, [0.5, 0.0]).trials
    assert math.isnan(half.movement.mean)
    assert set(half.movement.slices) == {"a", "b", "c"}
    assert not half.feasible
    assert still.movement.mean == 0
    assert still.feasible


def test_what_no_prompt_reads_may_not_be_finite_either(tmp_path):
    """As at the step: an audit would not see a bad row of the embeddings of which no control prompt has the token."""
    problem = token_problem()
    optimizer = wrap(problem, 1e-3, recorder=tmp_path)
    problem.backward(0)
    problem.model.embed.weight.grad[0] = math.nan
    optimizer.step()
    assert math.isnan(optimizer.last.candidate.mean)
    assert math.isnan(optimizer.remeasure(None, [0.5]).trials[-1].movement.mean)


def test_another_control_set_is_told(tmp_path):
    """The figures of other prompts do not go with those of the record."""
    problem, optimizer = recorded(tmp_path)
    train(problem, optimizer, 1)
    others = torch.randn(6, 5) * 3
    optimizer.bind(PolicyKL(lambda: problem.model(others), noise_floor=False), origin="now")
    with pytest.warns(UserWarning, match=r"the candidate of step 0 reads .* and read"):
        optimizer.remeasure(None, [0.5])


def test_another_pi_ref_is_told(tmp_path):
    """The same movement, from another origin of the drift."""
    problem, optimizer = recorded(tmp_path, budget=Budget(mean=1.0, drift=1.0))
    train(problem, optimizer, 2)
    last = read_flight(tmp_path)[-1]
    optimizer.refresh(restart_drift=True)
    train(problem, optimizer, [2])
    with pytest.warns(UserWarning, match=r"reads a drift of .* then"):
        optimizer.remeasure(last, [0.5])


# -- no trace ---------------------------------------------------------------------------------------------------------


def look(optimizer: STEPOptimizer, step: int) -> None:
    """Measure the latest step again, and the first one, and take the latest apart."""
    steps = read_flight(optimizer._run.recorder.folder)
    for kept in {steps[0].step: steps[0], steps[-1].step: steps[-1]}.values():
        optimizer.remeasure(kept, [0.25, 0.5])
    optimizer.attribute(by="module", audits=2)


RECIPES = st.builds(
    functools.partial,
    st.just(policy_problem),
    st.integers(0, 99),
    inner=st.sampled_from(sorted(INNER)),
    lr=st.sampled_from([1e-3, 0.03, 0.3]),
    dtype=st.sampled_from(sorted(DTYPES)),
    mixed=st.booleans(),
) | st.builds(
    functools.partial,
    st.just(token_problem),
    st.integers(0, 99),
    inner=st.sampled_from(sorted(INNER)),
    lr=st.just(0.03),
)
"""Ways to make a problem, twice the same."""


@pytest.mark.filterwarnings("ignore:the candidate of step")  # BatchNorm
@given(problem=RECIPES, controller=controllers(), budget=budgets(), snapshot=st.sampled_from(["device", "cpu"]))
def test_training_goes_on_as_if_nothing_had_happened(problem, controller, budget, snapshot):
    """Weights, state, gradients, buffers, random streams, records: those of the run without, bit for bit."""
    runs = []
    for between in (None, look):
        with tempfile.TemporaryDirectory() as folder:
            mine = problem()
            recorder = FlightRecorder(folder, when="always")
            optimizer = wrap(mine, budget, controller, recorder=recorder, snapshot=snapshot)
            runs.append(train(mine, optimizer, 3, between))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("controller", [Interpolate(), Steer(), Steer(pull=True)])
def test_pi_ref_and_what_a_controller_remembers_stay(tmp_path, controller):
    """At a cap on the drift: records with drift, cuts and pulls are those of the run without."""
    runs = []
    for between in (None, look):
        problem = token_problem(inner="AdamW")
        problem.kl = TokenKL(problem.model, problem.kl.control, pool=ControlSet.from_ids([[1], [2]], [[3, 4], [5]]))
        budget = Budget(mean=0.05, drift=0.02)
        recorder = FlightRecorder(tmp_path / str(between), when="always")
        runs.append(train(problem, wrap(problem, budget, controller, recorder=recorder), 8, between))
    assert runs[0] == runs[1]
    assert runs[0][-1]["record"]["reference_drift"]["mean"] > 0


@pytest.mark.filterwarnings("ignore:the candidate of step")
def test_copies_of_the_weights_in_the_state_stay(tmp_path):
    """Where an optimizer keeps copies of the weights that interpolation moves along."""
    runs = []
    for between in (None, look):
        problem = policy_problem()
        problem.optimizer = Follower(problem.model.parameters(), 0.05)
        recorder = FlightRecorder(tmp_path / str(between), when="always")
        runs.append(train(problem, wrap(problem, 1e-4, recorder=recorder, param_like="z"), 4, between))
    assert runs[0] == runs[1]


def test_before_the_first_step_of_a_resumed_run(tmp_path):
    """A new process measures a step of the one before; pi_ref is still the policy at its own first step."""
    problem, optimizer = recorded(tmp_path / "first")
    train(problem, optimizer, 2)
    (kept, _) = read_flight(tmp_path / "first")
    runs = []
    for look_first in (False, True):
        problem, optimizer = recorded(tmp_path / str(look_first))
        if look_first:
            before = picture(problem.model, optimizer)
            assert optimizer.remeasure(kept, [1.0]).trials[-1].movement == kept.record.candidate
            assert picture(problem.model, optimizer) == before
            assert not problem.kl.has_origin
        runs.append(train(problem, optimizer, 2))
    assert runs[0] == runs[1]


# -- errors and interrupts --------------------------------------------------------------------------------------------


def disturbed(tmp_path, fault: str, at=None):
    """A run, measured again with a fault at one place; whether the fault came."""
    problem, optimizer = recorded(tmp_path, budget=3e-4)
    train(problem, optimizer, 2)
    kept = read_flight(tmp_path)[0]
    before = picture(problem.model, optimizer), optimizer.state_dict()["step_optim"]
    tracer = Tracer(fault, at)
    raised = tracer.run(lambda: (optimizer.remeasure(kept, [0.5]), optimizer.attribute(kept, audits=2)))
    assert bits((picture(problem.model, optimizer), optimizer.state_dict()["step_optim"])) == bits(before), at
    assert tracer.fired == (at is not None)
    assert (raised is None) == (at is None) or tracer.dropped
    return tracer, problem, optimizer


@pytest.mark.parametrize("fault", ["error", "interrupt", "signal"])
def test_whatever_happens_in_it_leaves_no_trace(tmp_path, fault):
    """Errors and interrupts at lines and bytecodes all over it; then training goes on as if it had not been."""
    tracer, problem, optimizer = disturbed(tmp_path / "whole", fault)
    expected = train(problem, optimizer, [2])
    reads = "flight/kept.py"  # what goes wrong there is told as a damaged file, before anything has moved
    places = [(place, n) for place, count in tracer.seen.items() for n in {0, count - 1} if place[0] != reads]
    own = [at for at in places if at[0][0].startswith("flight/visit")]
    draw = random.Random(0)
    for at in [*draw.sample(own, min(len(own), 25)), *draw.sample(places, 20)]:
        _, problem, optimizer = disturbed(Path(tempfile.mkdtemp(dir=tmp_path)), fault, at)
        assert train(problem, optimizer, [2]) == expected, at


@pytest.mark.parametrize("look", [lambda o: o.remeasure(None, [0.5]), lambda o: str(o.attribute())])
def test_inference_mode_leaves_no_trace_either(tmp_path, look):
    """An evaluation callback runs in it; tensors that are made there could not be written by the next step."""
    left = []
    for looks in (False, True):
        problem, optimizer = recorded(tmp_path / str(looks))
        train(problem, optimizer, 2)
        if looks:
            with torch.inference_mode():
                inside = look(optimizer)
            assert inside == look(optimizer)
        left.append(train(problem, optimizer, [2, 3]))
    assert left[0] == left[1]


def test_parameters_that_were_frozen_since_have_their_part(tmp_path):
    """Nothing has to be trained to look at a step; and they are frozen still."""
    problem, optimizer = recorded(tmp_path)
    train(problem, optimizer, 2)
    expected = optimizer.attribute(by="module").to_dict()
    for parameter in problem.model.parameters():
        parameter.requires_grad_(False)
    assert optimizer.attribute(by="module").to_dict() == expected
    assert not any(parameter.requires_grad for parameter in problem.model.parameters())


def test_both_say_if_the_candidate_reads_otherwise(tmp_path):
    """A step that another closure has measured, by the bound one."""
    problem, optimizer = recorded(tmp_path)
    other = PolicyKL(lambda: problem.model(torch.full((3, 5), 0.1)), model=problem.model)
    problem.backward(0)
    optimizer.step(kl=other)
    for call in (lambda: optimizer.remeasure(None, [0.5]), optimizer.attribute):
        with pytest.warns(UserWarning, match=r"the candidate of step 0 reads .* and read"):
            call()


def test_an_attribution_has_the_notes_of_the_step(tmp_path):
    """Which batch did it stands in the table's head."""
    problem, optimizer = recorded(tmp_path)
    problem.backward(0)
    optimizer.note(batch=[3, 1, 4], source="math")
    optimizer.step()
    found = optimizer.attribute()
    assert found.to_dict()["notes"] == {"batch": [3, 1, 4], "source": "math"}
    assert str(found).splitlines()[1:3] == ["batch: 3, 1, 4", "source: math"]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alphas", [0.5, "0.5", [], ["0.5"], None, [None]])
def test_what_is_no_list_of_numbers_is_refused(alphas):
    """By name."""
    with pytest.raises(TypeError, match=r"alphas=.* is no list"):
        checked_alphas(alphas)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf])
def test_what_is_no_part_of_the_update_is_refused(alpha):
    """Also NaN."""
    with pytest.raises(ValueError, match="must be between 0"):
        checked_alphas([0.5, alpha])


def test_it_is_refused_where_it_cannot_be_put_back_or_measured(tmp_path):
    """In a window; without a KL closure; without a step."""
    problem, optimizer = recorded(tmp_path)
    with pytest.raises(ValueError, match="has kept none yet"):
        optimizer.remeasure(None, [0.5])
    train(problem, optimizer, 1)
    with optimizer.window():
        for call in (lambda: optimizer.remeasure(None, [0.5]), optimizer.attribute):
            with pytest.raises(RuntimeError, match=r"(remeasure|attribute)\(\) inside a window"):
                call()
        problem.backward(1)
        optimizer.step()
    with pytest.raises(TypeError, match="kept=3 is no KeptStep"):
        optimizer.remeasure(3, [0.5])
    bare = policy_problem()
    with pytest.raises(ValueError, match="kept=None is the latest step of recorder="):
        wrap(bare, 1e-3).remeasure(None, [0.5])
    with pytest.raises(RuntimeError, match="no KL closure"):
        STEPOptimizer(bare.optimizer, budget=1e-3).remeasure(read_flight(tmp_path)[0], [0.5])


class Narrow(nn.Module):
    """Parameters of given shapes."""

    def __init__(self, **shapes: Any) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))

    def forward(self) -> torch.Tensor:
        return sum(p.sum() for p in self.parameters()) * torch.eye(2)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": 2, "b": 4}, r"b is float32 \(3,\) there, and float32 \(4,\) here"),
        ({"a": 2}, "it has 2 tensors, and the optimizer has 1"),
        ({"a": 2, "b": 3, "c": 1}, "it has 2 tensors, and the optimizer has 3"),
        ({"b": 2, "a": 3}, "a is tensor 0 there, and tensor 1 here"),
    ],
)
def test_a_step_of_other_parameters_is_refused(tmp_path, shapes, message):
    """The first that does not fit is named, and nothing has changed."""

    def make(folder, **shapes):
        model = Narrow(**shapes)
        kl = PolicyKL(model, model=model, noise_floor=False)
        return model, STEPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), kl=kl, budget=1.0, recorder=folder)

    model, optimizer = make(FlightRecorder(tmp_path, when="always"), a=2, b=3)
    model()[0].sum().backward()
    optimizer.step()
    (kept,) = read_flight(tmp_path)
    other, optimizer = make(None, **shapes)
    with pytest.raises(ValueError, match=f"step_00000000.pt does not fit the optimizer's parameters: {message}"):
        optimizer.remeasure(kept, [0.5])
    assert all(bool((p == 1).all()) for p in other.parameters())


def test_budgets_that_cannot_be_judged_are_refused(tmp_path):
    """Slices that the KL closure does not have; a cap where pi_ref is not known."""
    problem, optimizer = recorded(tmp_path, budget=Budget(mean=1e-3, slices={"a": 1e-3}, drift=1.0))
    train(problem, optimizer, 1)
    (kept,) = read_flight(tmp_path)
    fresh = policy_problem()
    with pytest.raises(ValueError, match=r"had a cap on the drift, and .* knows no pi_ref yet"):
        wrap(fresh, 1e-3).remeasure(kept, [0.5])
    optimizer.set_budget(1e-3)
    optimizer.bind(PolicyKL(lambda: problem.model(torch.ones(6, 5)), {"other": [0]}, noise_floor=False), origin="now")
    train(problem, optimizer, [1])
    with pytest.raises(ValueError, match="'a'"):
        optimizer.remeasure(kept, [0.5])


def test_a_function_has_to_measure_from_the_kept_step(tmp_path):
    """Its reference is its own: another one than theta_t's is refused, with what helps."""
    weight, before = nn.Parameter(torch.zeros(2)), torch.zeros(2)
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        kl=lambda: ((weight - before) ** 2).sum(),
        budget=0.25,
        recorder=FlightRecorder(tmp_path, when="always"),
    )
    for gradient in (-1.0, -2.0):
        weight.grad = torch.tensor([gradient, 0.0])
        before.copy_(weight.detach())
        optimizer.step()
    first, last = read_flight(tmp_path)
    assert optimizer.remeasure(last, [0.1]).trials[-1].movement.mean == pytest.approx(0.04)
    with pytest.raises(ValueError, match=r"reads 0\.248 at theta_t of step 0.*KeptStep\.previous first"):
        optimizer.remeasure(first, [0.1])
    assert weight[0].item() == pytest.approx(1.0, rel=0.01)
    before.copy_(first.previous[0])
    assert optimizer.remeasure(first, [0.5]).trials[-1].movement.mean == pytest.approx(0.25)
