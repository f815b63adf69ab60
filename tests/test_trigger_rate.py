"""Budgets from movements: the formula, what rate comes out, and what the intervals cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from step_optim import Movement
from step_optim.precision import student_quantile
from step_optim.trigger_rate import budgets_at, checked_rate, figures, intervals_at, rounded_up

RATE = 0.05

kls = st.floats(1e-9, 10.0)
runs = st.integers(1, 4).flatmap(
    lambda names: st.lists(st.lists(kls, min_size=names, max_size=names), min_size=2, max_size=30)
)
rates = st.floats(0.001, 0.999)


def named(table) -> list[dict[str, float]]:
    """Steps, from a table of KLs [steps, constraints]."""
    return [{"mean" if j == 0 else f"slice:{j}": float(kl) for j, kl in enumerate(row)} for row in table]


def oracle(table, rate: float, ahead: bool = True) -> np.ndarray:
    """The docstring's formula once more, step by step in float64."""
    x = np.log(np.asarray(table, dtype=np.float64))
    n = len(x)
    m = x.mean(axis=0)
    d = (x - m).max(axis=1)
    if not ahead and rate * (n + 1) >= 1:
        places = np.arange(1, n + 1)
        return np.exp(m + np.interp(rate * (n + 1), places, np.sort(d)[::-1]))
    off = d - d.mean()
    r = float((off[1:] * off[:-1]).sum() / (off**2).sum()) if (off**2).sum() > 0 else 0.0
    r = min(max(r + (1 + 3 * r) / n, 0.0), 1.0)
    e = n / (1 + 2 * sum((1 - k / n) * r**k for k in range(1, n)))
    e = min(n, max(3, math.floor(e))) if ahead else n
    t = student_quantile(1 - rate, e - 1) if rate <= 0.5 else -student_quantile(rate, e - 1)
    limit = math.sqrt((e + 1) / (e - 1)) * (d.mean() + t * math.sqrt((off**2).mean()))
    return np.exp(m + (limit if ahead else max(limit, d.max())))


@given(table=runs, rate=rates, ahead=st.booleans())
def test_budgets_are_those_of_the_formula(table, rate, ahead) -> None:
    found = budgets_at(named(table), rate, ahead=ahead)
    assume(max(found.values()) < 1e300)
    assert list(found.values()) == pytest.approx(oracle(table, rate, ahead), rel=1e-6)


@given(table=runs, rate=rates, factor=st.floats(1e-3, 1e3))
def test_budgets_grow_with_the_movements(table, rate, factor) -> None:
    """In other units the budgets are the same."""
    small, large = budgets_at(named(table), rate), budgets_at(named(factor * np.asarray(table)), rate)
    assume(max(*small.values(), *large.values()) < 1e300)
    assert large == pytest.approx({name: factor * kl for name, kl in small.items()}, rel=1e-6)


@given(table=runs, pair=st.tuples(rates, rates), ahead=st.booleans())
@example(table=[[1.0]] * 4 + [[1e4]], pair=(0.166, 0.167), ahead=False)
def test_a_larger_rate_gives_no_larger_budget(table, pair, ahead) -> None:
    less, more = sorted(pair)
    wide, tight = (budgets_at(named(table), rate, ahead=ahead) for rate in (less, more))
    assert all(tight[name] <= wide[name] * (1 + 1e-9) for name in wide)


def test_one_constraint_has_the_textbook_prediction_limit() -> None:
    """Mean and spread of logarithms, Student's quantile and sqrt(1 + 1/n)."""
    logs = np.random.default_rng(0).normal(-4.0, 0.5, 200)
    n = len(logs)
    limit = logs.mean() + student_quantile(0.95, n - 1) * logs.std(ddof=1) * math.sqrt(1 + 1 / n)
    alternating = logs[np.argsort(logs)].reshape(2, -1).T.ravel()  # neighbours are unlike: all of them count
    found = budgets_at(named(np.exp(alternating)[:, None]), RATE)["mean"]
    assert math.log(found) == pytest.approx(limit, rel=1e-12)


def test_what_never_moved_gets_the_largest_budget() -> None:
    """And single zeros are no sign of the size of a movement."""
    steps = [{"mean": kl, "slice:a": 2 * kl, "slice:b": 0.0} for kl in (0.01, 0.02, 0.01, 0.03)]
    found = budgets_at(steps, RATE)
    assert found["slice:b"] == found["slice:a"] > found["mean"]
    steps[1]["slice:a"] = 0.0
    level = math.exp(np.mean(np.log([0.02, 0.02, 0.06])))
    assert found["slice:a"] > budgets_at(steps, RATE)["slice:a"] > level


def test_a_constraint_that_some_steps_lack_is_left_out() -> None:
    steps = [{"mean": 0.01, "slice:a": 0.01}, {"mean": 0.02}, {"mean": 0.01, "slice:a": 0.01}]
    assert list(budgets_at(steps, RATE)) == list(intervals_at(steps, RATE)) == ["mean"]


@pytest.mark.parametrize("extreme", [(1e-300, 1e300), (5e-324, 1.7e308)])
def test_extreme_movements_give_numbers(extreme) -> None:
    steps = [{"mean": kl} for kl in extreme * 5]
    assert rounded_up(budgets_at(steps, 1e-9)["mean"], 6) > 0
    assert all(0 <= low <= high for low, high in intervals_at(steps, 1e-9).values())


@given(kl=kls, count=st.integers(2, 40), rate=rates)
def test_steps_that_are_all_alike_are_within_their_budgets(kl, count, rate) -> None:
    found = budgets_at([{"mean": kl}] * count, rate)["mean"]
    assert kl * (1 - 1e-6) <= rounded_up(found, 6) <= kl * (1 + 2e-5)


@given(value=st.floats(1e-12, 1e12), digits=st.integers(1, 6))
def test_rounding_goes_up(value, digits) -> None:
    found = rounded_up(value, digits)
    assert value <= found <= value * (1 + 10 ** (1 - digits)) * (1 + 1e-12)
    assert float(f"{found:.{digits}g}") == found


def test_figures_of_a_movement() -> None:
    """KL by constraint; with a confidence upper bounds, which need the spread over prompts."""
    movement = Movement.over([0.01, 0.02, 0.06, 0.01], {"a": [0, 1]}, spans={"last": [0.5, 0.25]})
    assert figures(movement) == {"mean": movement.mean, "slice:a": 0.015, "slice:last": 0.375}
    assert figures(movement, 0.9)["slice:a"] == movement.upper(0.9, "a") > 0.015
    with pytest.raises(ValueError, match="means only"):
        figures(Movement(0.1), 0.9)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, math.nan, 1e-20])
def test_a_rate_is_between_0_and_1(rate) -> None:
    with pytest.raises(ValueError, match="trigger_rate="):
        checked_rate(rate)


@pytest.mark.parametrize("rate", [True, "0.05", None])
def test_a_rate_is_a_number(rate) -> None:
    with pytest.raises(TypeError, match="trigger_rate="):
        checked_rate(rate)


# -- simulations ------------------------------------------------------------------------------------------------------

AHEAD = 100
"""Steps over which the rate that comes out is counted."""


def logs_of_steps(
    draw: np.random.Generator, runs: int, steps: int, alike: float = 0.0, spread: float = 0.5, constraints: int = 7
) -> np.ndarray:
    """Logarithms of movements [runs, steps, constraints], of which 70 % of the variance is common to all constraints.

    Neighbours are correlated by ``alike``.
    """

    def series(*shape: int) -> np.ndarray:
        x = draw.standard_normal(shape)
        for t in range(1, steps):
            x[:, t] = alike * x[:, t - 1] + math.sqrt(1 - alike**2) * x[:, t]
        return x

    return spread * (math.sqrt(0.7) * series(runs, steps, 1) + math.sqrt(0.3) * series(runs, steps, constraints))


def bend(draw: np.random.Generator, runs: int, steps: int, factor: float, time: float) -> np.ndarray:
    """The same, with a level that starts at ``factor`` times the one it comes to."""
    level = math.log(factor) * np.exp(-np.arange(steps) / time)
    return logs_of_steps(draw, runs, steps, alike=0.5, spread=0.3) + level[None, :, None]


SIMULATIONS = {
    "independent": lambda *of: logs_of_steps(*of),
    "correlated 0.5": lambda *of: logs_of_steps(*of, alike=0.5),
    "correlated 0.8": lambda *of: logs_of_steps(*of, alike=0.8),
    "rising": lambda *of: bend(*of, factor=1 / 5, time=5),
    "falling": lambda *of: bend(*of, factor=5, time=5),
    "rising slowly": lambda *of: bend(*of, factor=1 / 5, time=20),
    "spreads": lambda *of: logs_of_steps(*of, alike=0.5) * np.array([0.2, 0.3, 0.3, 0.5, 0.5, 0.8, 1.2]) / 0.5,
}


def rate_that_comes_out(name: str, steps: int, runs: int) -> float:
    """The share of the steps after a warm-up that are over a budget, where `RATE` was asked."""
    found = np.exp(SIMULATIONS[name](np.random.default_rng(steps), runs, steps + AHEAD))
    over = []
    for table in found:
        budgets = budgets_at(named(table[steps // 4 : steps]), RATE)
        over.append((table[steps:] > list(budgets.values())).any(axis=1).mean())
    return float(np.mean(over))


@pytest.mark.parametrize(
    ("name", "steps", "low", "high"),
    [
        ("independent", 8, 0.03, 0.06),
        ("independent", 20, 0.03, 0.06),
        ("independent", 100, 0.04, 0.06),
        ("correlated 0.5", 8, 0.05, 0.10),
        ("correlated 0.5", 20, 0.03, 0.07),
        ("correlated 0.5", 100, 0.04, 0.06),
        ("correlated 0.8", 20, 0.05, 0.11),
        ("correlated 0.8", 50, 0.03, 0.08),
        ("rising", 20, 0.04, 0.11),
        ("rising", 50, 0.04, 0.07),
        ("falling", 20, 0.0, 0.03),
        ("falling", 50, 0.02, 0.06),
        ("rising slowly", 20, 0.2, 0.5),
        ("rising slowly", 100, 0.05, 0.12),
        ("spreads", 20, 0.05, 0.10),
    ],
)
def test_the_rate_that_comes_out_is_about_the_one_that_was_asked(name, steps, low, high) -> None:
    """As `budgets_at` says, and where it does not: a slow rise goes on after the warm-up."""
    assert low <= rate_that_comes_out(name, steps, runs=300) <= high


def coverage(steps: int, alike: float, runs: int) -> float:
    """How often intervals hold the budget that exactly `RATE` of all steps would be over."""
    draw = np.random.default_rng(steps)
    true = math.exp(np.quantile(logs_of_steps(draw, 40, 5000, alike)[:, 500:].max(axis=2), 1 - RATE))
    held = []
    for table in np.exp(logs_of_steps(draw, runs, steps, alike)):
        held += [low <= true <= high for low, high in intervals_at(named(table), RATE).values()]
    return float(np.mean(held))


@pytest.mark.parametrize(("steps", "alike"), [(20, 0.0), (50, 0.0), (20, 0.5), (50, 0.5), (50, 0.8), (100, 0.8)])
def test_intervals_cover_the_true_budget(steps, alike) -> None:
    assert coverage(steps, alike, runs=150) >= 0.91


def test_too_few_steps_have_no_interval() -> None:
    steps = [{"mean": kl} for kl in (0.01, 0.02, 0.01, 0.03, 0.02, 0.01, 0.02, 0.01, 0.04, 0.01)]
    assert intervals_at(steps[1:], RATE) == {"mean": (0.0, math.inf)}
    low, high = intervals_at(steps, RATE)["mean"]
    assert 0 < low < budgets_at(steps, RATE, ahead=False)["mean"] < high < math.inf


def test_a_log_has_about_as_many_steps_over_its_own_budgets() -> None:
    """For another run like it, whatever the distribution: here movement falls all the time."""
    table = np.exp(-np.arange(100) / 20)[:, None] * np.array([1.0, 2.0])
    budgets = budgets_at(named(table), RATE, ahead=False)
    assert (table > list(budgets.values())).any(axis=1).sum() == 5
