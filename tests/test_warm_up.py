"""Automatic budgets by themselves: what is refused, what is counted and fixed, and what a checkpoint keeps."""

from __future__ import annotations

import copy
import json
import logging
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Budget, Movement
from step_optim.budget import AutoBudget
from step_optim.trigger_rate import budgets_at, figures, rounded_up

kls = st.floats(1e-6, 1.0)
movements = st.builds(lambda mean, a, b: Movement(mean, {"a": a, "b": b}), kls, kls, kls)

KNOWN = Movement(0.02, {"a": 0.03, "b": 0.01})


def after(budget: Budget, *moved: Movement) -> Budget:
    for movement in moved:
        budget = budget.seen(movement)
    return budget


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"warmup": 1}, ValueError, "warmup=1 must be at least 2: one step shows no spread"),
        ({"warmup": 0}, ValueError, "warmup=0"),
        ({"warmup": 20.0}, TypeError, "warmup=20.0 is no number of steps"),
        ({"warmup": True}, TypeError, "warmup=True"),
        ({"trigger_rate": 0.0}, ValueError, "trigger_rate=0.0 must be above 0"),
        ({"trigger_rate": 1}, ValueError, "trigger_rate=1 must be above 0 and below 1"),
        ({"trigger_rate": "5%"}, TypeError, "trigger_rate='5%' is no number"),
        ({"ceiling": Budget.auto()}, ValueError, "is automatic itself"),
        ({"ceiling": "high"}, TypeError, "budget.ceiling='high' is no number"),
        ({"ceiling": -1.0}, ValueError, "budget.ceiling=-1.0 must be a KL"),
    ],
)
def test_what_is_refused(options, error, message) -> None:
    with pytest.raises(error, match=message):
        Budget.auto(**options)


@pytest.mark.parametrize("warmup", [2, 7])
def test_a_short_warm_up_is_warned_of(warmup) -> None:
    with pytest.warns(UserWarning, match=f"warmup={warmup}: so few steps") as caught:
        Budget.auto(warmup)
    assert caught[0].filename == __file__
    Budget.auto(8)


@given(moved=st.lists(movements, min_size=8, max_size=12), rate=st.floats(0.01, 0.5))
def test_the_budgets_are_of_the_steps_after_the_first_quarter(moved, rate) -> None:
    budget = after(Budget.auto(8, rate), *moved)
    expected = budgets_at([figures(movement) for movement in moved[2:8]], rate)
    assert budget.fixed == {name: rounded_up(kl, 6) for name, kl in expected.items()}
    limits = budget.at(100, ["a", "b"])
    assert {"mean": limits.mean, "slice:a": limits.slices["a"], "slice:b": limits.slices["b"]} == budget.fixed
    assert budget.seen(moved[0]) is budget  # for good


@given(moved=st.lists(movements, max_size=7))
def test_nothing_is_limited_before(moved) -> None:
    budget = after(Budget.auto(8), *moved)
    limits = budget.at(0, ["a", "b"])
    assert budget.fixed == {}
    assert not limits.limits_anything
    assert limits == Budget(mean=math.inf).at(0, ["a", "b"])
    assert budget.limits_anything  # the optimizer has to be ready


def test_a_budget_is_not_changed_by_what_follows() -> None:
    first = Budget.auto(8)
    after(first, *[KNOWN] * 8)
    assert first == Budget.auto(8)
    assert first.warm_up.counted == ()


@given(
    moved=st.lists(movements, min_size=8, max_size=8),
    mean=st.none() | kls,
    slices=st.none() | kls | st.fixed_dictionaries({"a": kls}),
    step=st.integers(0, 100),
)
def test_a_ceiling_is_above_the_budgets_all_the_time(moved, mean, slices, step) -> None:
    """Its caps, tails and confidence are in force as they are; schedules, too."""

    def fall(step: int) -> float:
        return 0.5 / (1 + step)

    ceiling = Budget(mean, slices, drift=0.1, drift_slices={"b": fall}, prompt=fall, token=2.0)
    given = Budget.auto(8, 0.1, ceiling=ceiling)
    assert given.at(step, ["a", "b"]) == ceiling.at(step, ["a", "b"])
    fixed, free = after(given, *moved).at(step, ["a", "b"]), after(Budget.auto(8, 0.1), *moved).at(step, ["a", "b"])
    above = ceiling.at(step, ["a", "b"])
    assert fixed.mean == min(free.mean, above.mean)
    assert fixed.slices == {name: min(kl, above.slices.get(name, math.inf)) for name, kl in free.slices.items()}
    assert (fixed.drift, fixed.drift_slices, fixed.prompt, fixed.token) == (0.1, {"b": fall(step)}, fall(step), 2.0)


def test_a_confidence_asks_for_budgets_of_upper_bounds() -> None:
    moved = [Movement.over([kl, 2 * kl, 4 * kl], {"a": [0, 1]}) for kl in (0.01, 0.02, 0.01, 0.03)]
    ceiling = Budget(mean=math.inf, confidence=0.9)
    plain, bounds = after(Budget.auto(8), *moved * 2), after(Budget.auto(8, ceiling=ceiling), *moved * 2)
    assert bounds.at(0).confidence == 0.9
    assert bounds.fixed["mean"] > plain.fixed["mean"]
    assert bounds.fixed["slice:a"] > plain.fixed["slice:a"]
    with pytest.raises(ValueError, match="means only"):
        Budget.auto(ceiling=ceiling).check_measured(Movement(0.1))
    Budget.auto(ceiling=ceiling).check_measured(Movement(math.nan))


def test_what_a_budget_says_of_itself() -> None:
    """It limits, every slice, and changes with the steps; the ceiling says whether it caps the drift."""
    budget = Budget.auto()
    assert budget.is_scheduled
    assert not budget.caps_drift
    assert budget.limited_slices(["a", "b"]) == ["a", "b"]
    assert Budget.auto(ceiling=Budget(drift=0.1)).caps_drift
    assert budget == Budget.auto(20, 0.05) != Budget.auto(20, 0.1)
    assert budget != Budget.auto(ceiling=1.0) != Budget(mean=1.0)
    assert budget.seen(KNOWN) != budget
    assert Budget.of(budget) is budget


def test_representations() -> None:
    with pytest.warns(UserWarning, match="warmup=3"):
        budget = Budget.auto(3)
    moved = [Movement(0.02, {"a": 0.04})] * 3
    assert repr(budget) == "Budget.auto(warmup=3, trigger_rate=0.05)"
    assert repr(after(budget, *moved[:2])) == "Budget.auto(warmup=3, trigger_rate=0.05) after 2 steps"
    assert repr(after(budget, *moved)) == "Budget.auto(warmup=3, trigger_rate=0.05) fixed at mean 0.02, slice:a 0.04"
    assert repr(Budget.auto(ceiling=0.1)).startswith("Budget.auto(warmup=20, trigger_rate=0.05) below Budget(mean=0.1")


def test_other_slices_are_refused_once_a_step_has_counted() -> None:
    """In the warm-up as after it, and in both directions."""
    begun, fixed = after(Budget.auto(8), KNOWN), after(Budget.auto(8), *[KNOWN] * 8)
    Budget.auto(8).check_slices(["x"])
    for budget in (begun, fixed):
        budget.check_slices(["b", "a"])
        budget.check_slices(None)
        for names in (["a"], ["a", "b", "c"], []):
            with pytest.raises(ValueError, match=r"is of the slices \['a', 'b'\].*begin anew with set_budget"):
                budget.check_slices(names)
    with pytest.raises(ValueError, match="unknown slice 'x'"):
        Budget.auto(ceiling=Budget(slices={"x": 0.1})).check_slices(["a"])


# -- checkpoints ------------------------------------------------------------------------------------------------------


@given(moved=st.lists(movements, min_size=1, max_size=12), cut=st.integers(0, 12))
def test_a_checkpoint_goes_on_to_the_bit(moved, cut) -> None:
    """Plain values, through JSON as well; copies and pickles, too."""
    whole = after(Budget.auto(8), *moved)
    state = json.loads(json.dumps(after(Budget.auto(8), *moved[:cut]).state_dict()))
    resumed = after(after(Budget.auto(8), KNOWN).loaded(state), *moved[cut:])
    assert resumed == whole
    assert repr(resumed.at(0, ["a", "b"])) == repr(whole.at(0, ["a", "b"]))
    assert copy.deepcopy(whole) == pickle.loads(pickle.dumps(whole)) == whole


def test_what_the_user_gives_wins() -> None:
    """An ordinary budget over an automatic one of the checkpoint, and the other way round."""
    plain = Budget(mean=0.1)
    assert plain.state_dict() == {}
    assert plain.loaded(after(Budget.auto(8), KNOWN).state_dict()) is plain
    assert after(Budget.auto(8), KNOWN).loaded(plain.state_dict()) == Budget.auto(8)


@pytest.mark.parametrize("asked", [{"warmup": 9}, {"trigger_rate": 0.1}, {"ceiling": Budget(mean=1.0, confidence=0.9)}])
def test_another_automatic_budget_begins_anew_and_says_so(asked, caplog) -> None:
    fixed = after(Budget.auto(8), *[KNOWN] * 8)
    given = Budget.auto(**{"warmup": 8, **asked})
    with caplog.at_level(logging.WARNING, "step_optim"):
        assert given.loaded(fixed.state_dict()) == given
    assert "begins anew: the checkpoint has one of {'steps': 8" in caplog.text


def test_another_ceiling_does_not_begin_anew() -> None:
    fixed = after(Budget.auto(8), *[KNOWN] * 8)
    lowered = Budget.auto(8, ceiling=0.01).loaded(fixed.state_dict())
    assert lowered.fixed == fixed.fixed
    assert lowered.at(0).mean == 0.01


@pytest.mark.parametrize(
    "damage",
    [
        {"counted": [{"slice:a": 0.1}]},
        {"counted": [{"mean": math.nan}]},
        {"counted": [{"mean": 0.0}]},
        {"counted": [{"mean": -1.0}]},
        {"counted": [{"mean": "x"}]},
        {"counted": [{"mean": 0.1}] * 8},
        {"counted": [0.1]},
        {"fixed": {"slice:a": 1.0}},
        {"fixed": {"mean": math.inf}},
        {"fixed": [1.0]},
    ],
)
def test_a_damaged_checkpoint_is_refused(damage) -> None:
    state = after(Budget.auto(8), KNOWN).state_dict() | damage
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
        Budget.auto(8).loaded(state)


def test_numbers_of_other_libraries_leave_plain_ones_in_a_checkpoint() -> None:
    """torch.load takes no others by default."""
    budget = Budget.auto(np.int64(20), np.float64(0.05))
    assert budget == Budget.auto(20, 0.05)
    assert [type(value) for value in (budget.warm_up.steps, budget.warm_up.trigger_rate)] == [int, float]
    assert type(Budget.auto(20, Fraction(1, 20)).warm_up.trigger_rate) is float


def test_a_checkpoint_of_another_budget_begins_anew_and_says_so(caplog) -> None:
    fixed = after(Budget.auto(8), *(Movement(0.01 * i) for i in range(1, 9)))
    assert fixed.fixed
    assert not fixed.loaded({}).fixed
    assert "begins anew: the checkpoint is of a run with another budget" in caplog.text
    caplog.clear()
    assert not Budget.auto(8).loaded({}).fixed
    assert not caplog.text


def test_enormous_movements_are_fixed_at_finite_budgets() -> None:
    """So that the checkpoint can be loaded."""
    budget = after(Budget.auto(8), *(Movement(10.0 ** (300 * (-1) ** i)) for i in range(8)))
    assert budget.fixed["mean"] < math.inf
    assert Budget.auto(8).loaded(budget.state_dict()) == budget


def test_its_kind_is_a_budget() -> None:
    assert isinstance(Budget.auto(), AutoBudget)
    assert isinstance(Budget.auto(), Budget)
