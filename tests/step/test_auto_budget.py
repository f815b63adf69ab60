"""Runs whose budgets choose themselves: the warm-up changes nothing, and what was fixed stands, through checkpoints."""

from __future__ import annotations

import copy
import io
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import (
    Action,
    Budget,
    ControlSet,
    Gate,
    Interpolate,
    Movement,
    PolicyKL,
    Project,
    Steer,
    STEPOptimizer,
    TokenKL,
    read_log,
    summarise,
)
from step_optim.limits import Limits
from tests.controllers.test_steer import World
from tests.strategies import INNER, Bigram, bits, controllers, picture, policy_problem, token_problem, wrap

WARMUP, STEPS = 8, 14

FREE = Limits()

SLICES = {"a": [0, 1, 2], "b": [2, 3], "c": [5]}
"""Of `policy_problem`."""

builds = st.sampled_from([policy_problem, token_problem])
inners = st.sampled_from(sorted(INNER))
seeds = st.integers(0, 10_000)


def auto(trigger_rate: float = 0.5, **options) -> Budget:
    """One that is over budget in about every second step."""
    return Budget.auto(WARMUP, trigger_rate, **options)


def plain(record):
    """A record without what differs between equal runs."""
    return record.to_dict() | {"seconds": None}


def train(problem, optimizer, steps):
    """Train; return the records."""
    records = []
    for step in steps:
        problem.backward(step)
        optimizer.step()
        records.append(optimizer.last)
    return records


def fixed_limits(record) -> Limits:
    """The limits that a record says to be in force from the next step on."""
    fixed = record.fixed_budget
    slices = {name.removeprefix("slice:"): kl for name, kl in fixed.items() if name != "mean"}
    return Limits(fixed["mean"], slices)


@given(build=builds, inner=inners, seed=seeds, controller=controllers(), windowed=st.integers(0, WARMUP - 1))
def test_the_warm_up_is_a_run_with_an_infinite_budget(build, inner, seed, controller, windowed) -> None:
    """Weights, optimizer state, random streams and records, to the bit; a window counts as a step."""
    pictures, stories = [], []
    for budget in (auto(), Budget(mean=math.inf)):
        problem = build(seed, inner=inner)
        optimizer = wrap(problem, budget, controller)
        torch.manual_seed(5)
        records = train(problem, optimizer, range(windowed))
        with optimizer.window():
            train(problem, optimizer, (20, 21))
        records += [optimizer.last, *train(problem, optimizer, range(windowed + 1, WARMUP))]
        stories.append([plain(record) | {"fixed_budget": None} for record in records])
        taken = picture(problem.model, optimizer)
        pictures.append([taken[part] for part in ("parameters", "buffers", "groups", "rng")])
        pictures[-1].append(bits(list(problem.optimizer.state.values())))
    assert pictures[0] == pictures[1]
    assert repr(stories[0]) == repr(stories[1])


@given(build=builds, inner=inners, seed=seeds, controller=controllers(), rate=st.sampled_from([0.05, 0.5, 0.9]))
def test_after_the_warm_up_every_step_is_within_budgets_that_stay(build, inner, seed, controller, rate) -> None:
    problem = build(seed, inner=inner)
    optimizer = wrap(problem, auto(rate), controller)
    records = train(problem, optimizer, range(STEPS))
    assert [record.step for record in records if record.fixed_budget] == [WARMUP - 1]
    assert all(record.budget == FREE for record in records[:WARMUP])
    fixed = fixed_limits(records[WARMUP - 1])
    assert set(fixed.slices) == set(problem.kl.slices)
    for record in records[WARMUP:]:
        assert record.budget == fixed
        assert fixed.judge(record.accepted).feasible


def test_the_controller_acts_on_what_was_fixed() -> None:
    problem = token_problem(3)
    records = train(problem, wrap(problem, auto(0.9)), range(STEPS))
    assert not any(record.triggered for record in records[:WARMUP])
    assert any(record.action is Action.SHRINK for record in records[WARMUP:])


@given(
    stop=st.integers(1, STEPS - 1),
    build=builds,
    inner=inners,
    controller=st.sampled_from([Gate(patience=2), Interpolate(), Project(steps=1), Steer(corrections=1)]),
    ceiling=st.sampled_from([None, 1e-3]),
)
def test_a_resumed_run_is_the_uninterrupted_one(stop, build, inner, controller, ceiling) -> None:
    """It goes on in the warm-up, or keeps its budgets to the bit; the checkpoint loads with weights_only=True."""
    budget = auto(ceiling=ceiling)

    def begun():
        problem = build(11, inner=inner)
        torch.manual_seed(5)
        return problem, wrap(problem, budget, controller)

    whole, whole_optimizer = begun()
    expected = [plain(record) for record in train(whole, whole_optimizer, range(STEPS))]
    first, first_optimizer = begun()
    train(first, first_optimizer, range(stop))
    file = io.BytesIO()
    parts = {"model": first.model.state_dict(), "optimizer": first_optimizer.state_dict()}
    torch.save(parts | {"rng": torch.get_rng_state()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, second_optimizer = begun()
    second.model.load_state_dict(saved["model"])
    second_optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    assert [plain(record) for record in train(second, second_optimizer, range(stop, STEPS))] == expected[stop:]
    assert bits(list(second.model.parameters())) == bits(list(whole.model.parameters()))
    assert second_optimizer.budget == whole_optimizer.budget
    assert second_optimizer.summary()["fixed_budget"] == whole_optimizer.summary()["fixed_budget"]


@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_budgets_are_in_the_units_of_the_movements(factor, seed) -> None:
    """A function that reads so many times as much gets budgets that are so many times as large."""
    found = []
    for unit in (1.0, factor):
        weight, before = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)), torch.zeros(2, dtype=torch.float64)

        def moved(weight=weight, before=before, unit=unit):
            kl = unit * float((weight.detach() - before).square().sum())
            return {"mean": kl, "a": 2 * kl}

        optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=0.1), kl=moved, budget=auto())
        generator = torch.Generator().manual_seed(seed)
        for _ in range(WARMUP):
            weight.grad = torch.randn(2, generator=generator, dtype=torch.float64)
            before.copy_(weight.detach())
            optimizer.step()
        found.append(optimizer.last.fixed_budget)
    assert found[1] == pytest.approx({name: factor * kl for name, kl in found[0].items()}, rel=2e-5)


# -- where it is told -------------------------------------------------------------------------------------------------


def test_the_budgets_are_told_everywhere(tmp_path, caplog) -> None:
    """In the log of `logging`, in the record that fixed them and those that follow, in the summary and in its text."""
    path, problem = tmp_path / "run.jsonl", token_problem(3)
    optimizer = wrap(problem, auto(), log=path)
    with caplog.at_level(logging.INFO, "step_optim"):
        train(problem, optimizer, range(STEPS))
    told = [record.getMessage() for record in caplog.records if "fixed at" in record.getMessage()]
    assert told == [f"step {WARMUP - 1}: {optimizer.budget!r}"]
    records = read_log(path)
    fixed = records[WARMUP - 1].fixed_budget
    assert fixed == optimizer.budget.fixed == optimizer.summary()["fixed_budget"]
    assert list(fixed) == ["mean", "slice:a", "slice:b"]
    assert records[WARMUP].budget == fixed_limits(records[WARMUP - 1])
    assert summarise(records) == optimizer.summary()
    assert records[WARMUP - 1].flat()["step_optim/fixed_budget/slice:a"] == fixed["slice:a"]
    assert "Budget.auto(warmup=8" in path.read_text().splitlines()[0]


def test_a_later_fix_replaces_the_one_before_in_the_summary() -> None:
    problem = policy_problem(3)
    optimizer = wrap(problem, auto())
    train(problem, optimizer, range(WARMUP))
    assert list(optimizer.summary()["fixed_budget"]) == ["mean", "slice:a", "slice:b", "slice:c"]
    optimizer.set_budget(auto())
    optimizer.bind(PolicyKL(lambda: problem.model(torch.ones(6, 5)), noise_floor=False))
    train(problem, optimizer, range(WARMUP))
    assert optimizer.summary()["fixed_budget"] == optimizer.budget.fixed
    assert list(optimizer.budget.fixed) == ["mean"]


def test_runs_with_other_budgets_say_nothing_of_it() -> None:
    problem = token_problem(3)
    optimizer = wrap(problem, Budget(mean=1e-4))
    train(problem, optimizer, range(2))
    assert optimizer.summary()["fixed_budget"] == optimizer.last.fixed_budget == {}
    state = optimizer.state_dict()["step_optim"]
    assert set(state) == {"version", "step", "rejected_in_a_row", "summary", "controller", "kl"}
    assert not [name for name in state["summary"] if "fixed" in name]


# -- what counts ------------------------------------------------------------------------------------------------------


def counted(optimizer) -> int:
    return len(optimizer.budget.warm_up.counted)


def test_steps_that_say_nothing_do_not_count() -> None:
    """Unchanged, not finite, and errors, whether they are raised or settled as rejections."""
    problem = policy_problem(0)
    optimizer = wrap(problem, auto(), on_error="reject")
    train(problem, optimizer, range(2))
    assert counted(optimizer) == 2
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="none of the optimizer's"):
        optimizer.step()
    assert optimizer.last.action is Action.UNCHANGED
    problem.backward(3)
    problem.model.body.weight.grad[0] = math.nan
    optimizer.step()
    assert optimizer.last.error
    problem.backward(4)
    optimizer.step(kl=lambda: 1 / 0)
    assert optimizer.last.error
    before = optimizer.budget
    problem.backward(5)
    with pytest.raises(KeyboardInterrupt), optimizer.window():
        optimizer.step()
        raise KeyboardInterrupt
    assert optimizer.budget is before
    assert counted(optimizer) == 2


def test_a_policy_that_did_not_move_does_not_count() -> None:
    """Weights that the control set does not read."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=lambda: 0.0, budget=auto())
    weight.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.last.action is Action.COMMIT
    assert counted(optimizer) == 0


def test_a_closure_of_one_step_counts_only_where_none_is_bound() -> None:
    problem = policy_problem(0)
    other = PolicyKL(lambda: problem.model(torch.ones(6, 5)), SLICES, noise_floor=False)
    optimizer = wrap(problem, auto())
    problem.backward(0)
    optimizer.step(kl=other)
    assert counted(optimizer) == 0
    optimizer.step(kl=problem.kl)
    assert counted(optimizer) == 1
    unbound = STEPOptimizer(torch.optim.SGD(problem.model.parameters(), lr=0.1), budget=auto())
    problem.backward(1)
    unbound.step(problem.kl)
    assert counted(unbound) == 1


def test_rejected_steps_count_with_what_was_proposed() -> None:
    """A ceiling may reject in the warm-up."""
    problem = policy_problem(0)
    optimizer = wrap(problem, auto(ceiling=1e-9), Gate())
    records = train(problem, optimizer, range(WARMUP))
    assert all(record.action is Action.REJECT for record in records)
    assert records[-1].fixed_budget["mean"] > 1e-9
    assert optimizer.budget.at(WARMUP).mean == 1e-9
    assert train(problem, optimizer, [WARMUP])[0].budget.mean == 1e-9


def test_spans_are_slices() -> None:
    torch.manual_seed(0)
    model = Bigram()
    control = ControlSet.from_ids([[1, 2], [3]], [[7, 8, 9], [10, 11]])
    kl = TokenKL(model, control, noise_floor=False, spans={"opening": (0, 1)})
    optimizer = STEPOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), kl=kl, budget=auto())
    for _ in range(WARMUP):
        optimizer.zero_grad()
        model(torch.randint(13, (3, 6))).square().mean().backward()
        optimizer.step()
    assert list(optimizer.last.fixed_budget) == ["mean", "slice:opening"]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_function_with_other_slices_than_before_is_refused_in_its_step() -> None:
    """Nothing has changed then, and the next step goes on."""
    weight, reads = torch.nn.Parameter(torch.zeros(2)), {"a": 0.1}
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=lambda: dict(reads), budget=auto())
    weight.grad = torch.ones(2)
    optimizer.step()
    reads["b"] = 0.1
    with pytest.raises(ValueError, match=r"is of the slices \['a'\].*the KL closure has \['a', 'b'\]"):
        optimizer.step()
    assert counted(optimizer) == 1
    assert weight.tolist() == [-1.0, -1.0]
    del reads["b"]
    optimizer.step()
    assert counted(optimizer) == 2


def test_another_closure_has_to_have_the_same_slices() -> None:
    problem = policy_problem(0)
    optimizer = wrap(problem, auto())
    fresh = PolicyKL(lambda: problem.model(torch.ones(6, 5)), SLICES, noise_floor=False)
    other = PolicyKL(lambda: problem.model(torch.ones(6, 5)), {"a": [0, 1]}, noise_floor=False)
    train(problem, optimizer, range(2))
    optimizer.bind(fresh)
    with pytest.raises(ValueError, match="begin anew"):
        optimizer.bind(other)
    optimizer.set_budget(auto())
    optimizer.bind(other)
    assert list(train(problem, optimizer, range(WARMUP))[-1].fixed_budget) == ["mean", "slice:a"]


def test_a_checkpoint_of_other_slices_is_refused() -> None:
    """Before anything has changed."""
    problem = policy_problem(0)
    optimizer = wrap(problem, auto())
    train(problem, optimizer, range(2))
    other = wrap(problem, auto())
    other.bind(PolicyKL(lambda: problem.model(torch.ones(6, 5)), {"a": [0, 1]}, noise_floor=False))
    with pytest.raises(ValueError, match="begin anew"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert counted(other) == 0


def test_a_damaged_checkpoint_is_refused() -> None:
    problem = policy_problem(0)
    optimizer = wrap(problem, auto())
    train(problem, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["step_optim"]["budget"]["counted"][0]["mean"] = math.nan
    with pytest.raises(ValueError, match="entry 'step_optim' is damaged"):
        optimizer.load_state_dict(state)
    assert counted(optimizer) == 2


def test_a_confidence_without_a_spread_is_refused_in_the_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    budget = auto(ceiling=Budget(mean=math.inf, confidence=0.9))
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=lambda: 0.1, budget=budget)
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="means only"):
        optimizer.step()
    assert weight.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="slice 'c' has one"):
        wrap(policy_problem(0), budget)


def test_a_pool_without_a_slice_is_refused_from_the_start() -> None:
    """Every slice will have a budget."""
    world = World()
    pool = PolicyKL(lambda: world.layer(torch.ones(8, 4, dtype=torch.float64)), {"a": range(8)}, noise_floor=False)
    kl = PolicyKL(lambda: world.layer(torch.eye(4, dtype=torch.float64)), {"a": [0], "b": [1]}, pool=pool)
    with pytest.raises(ValueError, match="slice 'b', of which the pool has no prompts"):
        STEPOptimizer(torch.optim.Adam(world.layer.parameters()), kl=kl, budget=auto(), controller=Steer())


# -- beside other things ----------------------------------------------------------------------------------------------


def test_what_was_given_wins_over_a_checkpoint() -> None:
    problem = policy_problem(0)
    optimizer = wrap(problem, auto())
    train(problem, optimizer, range(WARMUP))
    explicit = wrap(policy_problem(0), Budget(mean=0.5))
    explicit.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert explicit.budget == Budget(mean=0.5)
    begins = wrap(policy_problem(0), auto())
    begins.load_state_dict(copy.deepcopy(explicit.state_dict()))
    assert begins.budget == auto()


def test_set_budget_ends_it_and_a_copy_goes_on() -> None:
    problem = policy_problem(0)
    optimizer = wrap(problem, auto())
    train(problem, optimizer, range(3))
    assert copy.deepcopy(optimizer).budget == optimizer.budget != auto()
    optimizer.set_budget(0.1)
    assert train(problem, optimizer, range(STEPS))[-1].budget == Limits(0.1)


def test_steer_holds_a_cap_of_the_ceiling_and_what_was_fixed() -> None:
    world = World()
    optimizer = world.optimizer(auto(ceiling=Budget(drift=0.02)))
    records = [world.step(optimizer) for _ in range(STEPS)]
    assert all(record.budget.drift == 0.02 for record in records)
    assert all(record.reference_drift.mean <= 0.02 for record in records)
    assert any(record.action is Action.STEER for record in records)
    assert all(record.budget.judge(record.accepted, record.reference_drift).feasible for record in records)
    assert records[-1].budget.mean == records[WARMUP - 1].fixed_budget["mean"]


def test_adaptive_rates_begin_with_what_was_fixed() -> None:
    """An infinite budget says nothing about the rate."""
    problem = token_problem(3, lr=0.1)
    optimizer = wrap(problem, auto(0.9), adaptive_rate=True)
    records = train(problem, optimizer, range(STEPS))
    assert all(record.scale == 1 for record in records[: WARMUP + 1])
    assert min(record.scale for record in records) < 1


def test_budgets_below_the_noise_of_the_audit_are_warned_of_once_they_are_fixed() -> None:
    """As an ordinary budget is when it is set: here one weight of a bf16 model moves by its last bit."""
    model = torch.nn.Linear(8, 6).to(torch.bfloat16)
    torch.nn.init.constant_(model.weight, 0.5)
    kl = PolicyKL(lambda: model(torch.eye(8, dtype=torch.bfloat16)))
    optimizer = STEPOptimizer(torch.optim.SGD([model.weight], lr=1.0), kl=kl, budget=auto())

    def step(index: int) -> None:
        model.weight.grad = torch.zeros_like(model.weight)
        model.weight.grad[0, 0] = (-1) ** index * 2.0**-8
        optimizer.step()

    for index in range(WARMUP):
        step(index)
    assert 0 < optimizer.last.fixed_budget["mean"] < kl.noise_floor.measured.mean
    with pytest.warns(UserWarning, match="reads more than the budget allows"):
        step(0)
    step(1)  # and not again


def test_a_slice_that_never_moved_has_a_budget() -> None:
    """The largest of the others'."""
    weight, size = torch.nn.Parameter(torch.zeros(2)), iter([0.1, 0.2, 0.1, 0.3] * 4)
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0), kl=lambda: Movement(next(size), {"a": 0.0}), budget=auto()
    )
    weight.grad = torch.ones(2)
    for _ in range(WARMUP):
        optimizer.step()
    fixed = optimizer.budget.fixed
    assert fixed["slice:a"] == fixed["mean"] > 0.1
