"""What other budgets would have caught: against curves that are known, and against steps that other budgets took."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Action, Budget, Interpolate, Movement, PolicyKL, Steer, STEPOptimizer, StepRecord
from step_optim.__main__ import main
from step_optim.limits import Limits
from step_optim.telemetry import JSONLWriter, TrialRecord, replay
from step_optim.telemetry.budget_text import read_budget
from step_optim.telemetry.largest_part import NEAR_ZERO, LargestPart, largest_part
from step_optim.telemetry.replay import NOT_FINITE, STEP_LOCAL

ROUNDING = 1e-9
"""Relative; figures and logarithms are float64."""


# -- curves that are known ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """K_s(alpha) = c alpha^p of two slices of equal size; the mean is their mixture."""

    slices: Mapping[str, tuple[float, float]]

    def at(self, alpha: float) -> Movement:
        slices = {name: c * alpha**p for name, (c, p) in self.slices.items()}
        return Movement(sum(slices.values()) / len(slices), slices)

    @property
    def powers(self) -> list[float]:
        return [p for _, p in self.slices.values()]


def largest(is_within: Callable[[float], bool]) -> float:
    """The largest alpha that is within a budget, by bisection: slow, and obviously right where KL rises."""
    if is_within(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if is_within(middle) else (low, middle)
    return low


def logged(curves: Curves, alphas: list[float], step: int = 0) -> StepRecord:
    """A step with trials at these alphas. What its own budget said of them does not count."""
    trials = tuple(TrialRecord(alpha, curves.at(alpha), False) for alpha in alphas)
    return StepRecord(step, Action.REJECT, curves.at(1), Movement(0.0), Limits(), triggered=True, trials=trials)


curves = st.builds(
    lambda a, b: Curves({"a": a, "b": b}),
    *[st.tuples(st.floats(-6, 1).map(lambda e: 10.0**e), st.floats(1.05, 2.95)) for _ in "ab"],
)
grids = st.lists(st.integers(1, 99).map(lambda i: i / 100), max_size=4, unique=True)
limits = st.floats(-8, 1).map(lambda e: 10.0**e)


@given(curves=curves, alphas=grids, mean=st.just(math.inf) | limits, slices=limits)
def test_caught_steps_and_their_alpha_on_curves_that_are_known(curves, alphas, mean, slices) -> None:
    """A step is caught exactly if it is over; alpha lies between the measured ends, and the estimate near it.

    From the next point above the budget, with y = log(K / eps) there, alpha is y / p_max to y / p_min below on a
    logarithmic scale, whatever mixture of powers K is. The estimate uses a power that was seen, or 2.
    """
    budget = Budget(mean=mean, slices={"a": slices})
    figures = {"mean": (lambda moved: moved.mean, mean), "slice:a": (lambda moved: moved.slices["a"], slices)}
    over = {name for name, (read, eps) in figures.items() if read(curves.at(1)) > eps}
    found = replay([logged(curves, alphas)], budget)
    assert len(found.caught) == bool(over)
    if not over:
        return
    (caught,) = found.caught
    assert caught.bound in over
    assert caught.ratio == max(read(curves.at(1)) / figures[name][1] for name, (read, _) in figures.items())
    alpha = largest(lambda at: all(read(curves.at(at)) <= eps for read, eps in figures.values()))
    low, high = caught.interval
    assert low <= alpha * (1 + ROUNDING)
    assert alpha <= high
    assert {low, high} <= {0.0, 1.0, *alphas}
    assert low <= caught.alpha <= high
    powers = [*curves.powers, NEAR_ZERO]
    tolerance = 0.0
    for read, eps in (figures[name] for name in over):
        y = min(math.log(k / eps) for at in [*alphas, 1.0] if (k := read(curves.at(at))) > eps)
        tolerance = max(tolerance, y * (1 / min(powers) - 1 / max(powers)))
    assert abs(math.log(caught.alpha / alpha)) <= tolerance + ROUNDING


@given(c=limits, p=st.floats(1.05, 2.95), alpha=st.integers(1, 99).map(lambda i: i / 100), eps=st.floats(0.01, 0.99))
def test_estimates_between_and_below_what_was_measured(c, p, alpha, eps) -> None:
    """Between two points on c alpha^p the estimate is exact; below both it is that of alpha²."""
    (caught,) = replay([logged(Curves({"a": (c, p)}), [alpha])], c * eps).caught
    below = alpha * math.sqrt(eps / alpha**p)
    assert caught.alpha == pytest.approx(eps ** (1 / p) if eps > alpha**p else below, rel=1e-6)


@given(
    start=st.floats(0, 0.99),
    rise=st.floats(-0.5, 3),
    bend=st.floats(0.01, 3),
    at=st.none() | st.integers(1, 99).map(lambda i: i / 100),
    other=st.floats(0.01, 3),
)
def test_drifts_along_a_parabola(start, rise, bend, at, other) -> None:
    """With KL = bend alpha² the ends tell alpha; with another curvature the committed part does, which is the third."""

    def drift(alpha: float) -> Movement:
        kl = start + rise * alpha + bend * alpha**2
        return Movement(max(kl, 0.0), {"a": max(2 * kl, 0.0)})

    moved = bend if at is None else other
    step = StepRecord(
        4,
        Action.COMMIT if at is None else Action.SHRINK,
        Movement(moved, {"a": 2 * moved}),
        Movement(0.0, {"a": 0.0}),
        Limits(),
        alpha=1.0 if at is None else at,
        previous_drift=drift(0),
        candidate_drift=drift(1),
        reference_drift=drift(1 if at is None else at),
    )
    for budget in (Budget(drift=1.0), Budget(drift_slices={"a": 2.0})):
        found = replay([step], budget).caught
        assert len(found) == (drift(1).mean > 1)
        if found and (at is None or min(drift(at).mean, start + rise + bend) > 0):
            alpha = largest(lambda alpha: start + rise * alpha + bend * alpha**2 <= 1)
            low, high = found[0].interval
            assert low - 1e-6 <= alpha <= high + 1e-6
            assert {low, high} <= {0.0, 1.0, at}
            assert found[0].alpha == pytest.approx(alpha, abs=1e-5)


def drifted(before: float, after: float, **values) -> StepRecord:
    moved = {"candidate": Movement(0.01), "accepted": Movement(0.01), "reference_drift": Movement(after)} | values
    drifts = {"previous_drift": Movement(before), "candidate_drift": Movement(after)}
    return StepRecord(0, Action.COMMIT, budget=Limits(drift=9.0), alpha=1.0, **(drifts | moved))


def test_a_cap_that_was_exceeded_before_asks_for_less_than_before() -> None:
    assert replay([drifted(0.3, 0.29)], Budget(drift=0.1)).caught == ()
    (caught,) = replay([drifted(0.3, 0.31)], Budget(drift=0.1)).caught
    assert (caught.bound, caught.interval, caught.alpha) == ("drift", (0.0, 1.0), None)


def test_alpha_is_unknown_if_one_of_the_constraints_leaves_it_so() -> None:
    (caught,) = replay([drifted(0.3, 0.31)], Budget(mean=0.005, drift=0.1)).caught
    assert (caught.bound, caught.alpha) == ("mean", None)


def test_trials_say_nothing_of_drifts_that_are_not_in_the_log() -> None:
    """A trial within the budget of the step may be beyond a cap, unless a later point is within that."""
    trials = (TrialRecord(0.5, Movement(0.0025), True),)
    step = drifted(0.0, 0.04, trials=trials)
    assert largest_part(step, Limits(mean=0.005, drift=1.0)).low == 0.5
    assert largest_part(step, Limits(mean=0.005, drift=0.03)) == LargestPart(0.0, 1.0, pytest.approx(0.707, abs=1e-3))
    assert largest_part(step, Limits(mean=0.002, drift=0.03)).high == 0.5


def test_budgets_of_nothing() -> None:
    step = replace(drifted(0.0, 0.04), trials=(TrialRecord(0.5, Movement(0.0025), True),))
    for budget in (Budget(mean=0.0), Budget(drift=0.0)):
        (caught,) = replay([step], budget).caught
        assert (caught.alpha, caught.interval[0], caught.ratio) == (0.0, 0.0, math.inf)


def test_where_nothing_tells_where_a_drift_began() -> None:
    step = replace(drifted(0.0, 0.2), previous_drift=None)
    (caught,) = replay([step], Budget(drift=0.1)).caught
    assert (caught.alpha, caught.interval) == (None, (0.0, 1.0))


def test_a_curve_that_falls_again() -> None:
    """The low end is the largest alpha that was within; the high one the next that was not."""
    kls = {0.2: 0.05, 0.4: 0.3, 0.6: 0.08, 0.8: 0.2}
    trials = tuple(TrialRecord(alpha, Movement(kl), False) for alpha, kl in kls.items())
    step = StepRecord(0, Action.REJECT, Movement(0.25), Movement(0.0), Limits(), trials=trials)
    (caught,) = replay([step], 0.1).caught
    assert caught.interval == (0.6, 0.8)
    assert caught.alpha == 0.6
    (caught,) = replay([replace(step, trials=trials[1:2])], 0.1).caught
    assert caught.alpha == pytest.approx(0.4 / math.sqrt(3))


def test_weights_off_the_line_are_left_out() -> None:
    trials = (TrialRecord(None, Movement(0.001), True), TrialRecord(0.5, Movement(0.01), False))
    step = StepRecord(0, Action.STEER, Movement(0.04), Movement(0.001), Limits(mean=0.005), trials=trials)
    (caught,) = replay([step], 0.0025).caught
    assert (caught.interval, caught.own_alpha) == ((0.0, 0.5), None)
    assert caught.alpha == pytest.approx(0.25)


# -- candidates that are not finite, steps without one -----------------------------------------------------------------

NAN = Movement(math.nan, {"a": math.nan})
STILL = Movement(0.0, {"a": 0.0})


def test_candidates_that_are_not_finite_are_caught() -> None:
    """At alpha 0, or at what was measured to be within; also where the budget is on what was not measured then."""
    step = StepRecord(3, Action.REJECT, NAN, STILL, Limits(), triggered=True, error="not finite")
    trials = (TrialRecord(0.5, NAN, False), TrialRecord(0.25, Movement(0.01, {"a": 0.02}), True))
    found = replay([step, replace(step, step=4, trials=trials)], Budget(mean=0.015, slices=1.0))
    assert [caught.bound for caught in found.caught] == [NOT_FINITE] * 2
    assert [caught.alpha for caught in found.caught] == [0.0, 0.25]
    assert [caught.interval for caught in found.caught] == [(0.0, 1.0), (0.25, 0.5)]
    assert (found.steps, found.errors) == (2, 0)
    assert json.dumps(found.to_dict(), allow_nan=False)
    (caught,) = replay([step], Budget(drift=0.1, prompt=0.1, token=0.1)).caught
    assert caught.alpha == 0.0


def test_a_drift_that_is_not_finite_is_caught_only_where_it_is_capped() -> None:
    step = drifted(0.0, math.nan)
    assert replay([step], 0.02).caught == ()
    (caught,) = replay([step], Budget(mean=0.02, drift=0.1)).caught
    assert (caught.bound, caught.alpha) == (NOT_FINITE, 0.0)


def test_steps_without_a_candidate_are_counted_apart() -> None:
    moved = Movement(0.01)
    records = [
        StepRecord(0, Action.UNCHANGED, STILL, STILL, Limits()),
        StepRecord(1, Action.REJECT, NAN, STILL, Limits(), error="RuntimeError: as planned"),
        StepRecord(2, Action.COMMIT, moved, moved, Limits(), alpha=1.0),
    ]
    found = replay(records, 0.005)
    assert (found.steps, found.unchanged, found.errors, len(found.caught)) == (1, 1, 1, 1)
    assert "beside them 1 steps moved nothing, and 1 ended in an error" in str(found)
    assert "0 of 0 steps" in str(replay([], 0.005))


# -- what a log cannot answer ------------------------------------------------------------------------------------------

SLICED = StepRecord(7, Action.COMMIT, Movement(0.01, {"a": 0.02}), STILL, Limits())
WHOLE = StepRecord(7, Action.COMMIT, Movement(0.01), Movement(0.0), Limits())


@pytest.mark.parametrize(
    ("record", "budget", "message"),
    [
        (WHOLE, Budget(mean=0.1, confidence=0.9), "confidence=0.9 needs the KL of each prompt"),
        (WHOLE, Budget(mean=0.1, path=1.0), "caps the path, .* leave path= and path_slices= out"),
        (WHOLE, Budget(mean=0.1, path_slices=1.0), "caps the path, .* leave path= and path_slices= out"),
        (WHOLE, Budget.auto(), "Budget.auto.* depends on the steps before"),
        (WHOLE, Budget(slices={"b": 0.1}), "limits 'b', and step 7 of the log has no slices"),
        (WHOLE, Budget(slices=0.1), "limits 'any slice', and step 7 of the log has no slices"),
        (SLICED, Budget(slices={"b": 0.1}), r"limits 'b', and step 7 of the log has the slices \['a'\]"),
        (SLICED, Budget(prompt=0.1), "prompt=0.1 limits the worst prompt.*step 7.*it has mean, slice:a$"),
        (SLICED, Budget(token=0.1), "token=0.1 limits the worst token, .*step 7"),
        (SLICED, Budget(drift=0.1), "caps the drift, and step 7 of the log has no drift.*it has mean, slice:a$"),
        (SLICED, Budget(drift_slices=0.1), "caps the drift"),
        (WHOLE, Budget(mean=0.1, drift_slices=0.1), "drift_slices limits 'any slice', .*has no slices"),
        (drifted(0.0, 0.1), Budget(drift_slices={"a": 0.1}), "drift_slices limits 'a', .*has no slices"),
        (drifted(0.0, 0.1), Budget(drift=1.0, prompt=0.1), "it has mean, drift$"),
    ],
)
def test_what_the_log_does_not_have_is_refused(record, budget, message) -> None:
    with pytest.raises(ValueError, match=message):
        replay([record], budget)


def test_what_is_unlimited_needs_no_figure() -> None:
    budget = Budget(mean=0.1, slices={"b": math.inf}, drift=math.inf, prompt=math.inf)
    assert replay([SLICED, WHOLE], budget).caught == ()
    assert replay([SLICED, WHOLE], Budget(mean=0.1, slices=math.inf, drift_slices=lambda step: math.inf)).caught == ()


def test_prompts_and_tokens_where_they_were_measured() -> None:
    step = replace(SLICED, candidate=Movement(0.01, {"a": 0.02}, prompt=0.5, token=2.0))
    assert [caught.bound for caught in replay([step], Budget(prompt=0.4, token=1.9)).caught] == ["prompt"]
    assert [caught.bound for caught in replay([step], Budget(prompt=0.6, token=1.0)).caught] == ["token"]


def test_schedules_are_taken_at_the_step_of_each_record() -> None:
    records = [replace(WHOLE, step=step) for step in (3, 5, 9)]
    found = replay(records, Budget(mean=lambda step: 0.02 if step == 5 else 0.005))
    assert [caught.step for caught in found.caught] == [3, 9]
    assert replay([WHOLE], Budget(mean=0.1, drift=lambda step: math.inf)).caught == ()


# -- the first step that would be decided otherwise --------------------------------------------------------------------


def caught_by(limit: float, action: Action, alpha: float | None, **values) -> StepRecord:
    """A step of KL 0.04, caught by its own budget for the mean."""
    accepted = STILL if alpha == 0 else Movement(limit, {"a": 0.013})
    own = {"triggered": True, "bound": "mean", "alpha": alpha, "budget": Limits(mean=limit)}
    return StepRecord(0, action, accepted=accepted, **({"candidate": Movement(0.04, {"a": 0.05})} | own | values))


COMMITTED = StepRecord(0, Action.COMMIT, Movement(0.01), Movement(0.01), Limits(mean=0.02), alpha=1.0)
CAPPED = {"previous_drift": Movement(0.0), "candidate_drift": Movement(0.04)}
INFINITE = caught_by(0.01, Action.SHRINK, 0.5, bound=None, candidate=Movement(math.inf))
HALF = {"trials": (TrialRecord(0.5, Movement(0.01, {"a": 0.013}), True),)}


@pytest.mark.parametrize(
    ("record", "budget", "differs"),
    [
        (COMMITTED, Budget(mean=0.015), False),  # neither catches it
        (COMMITTED, Budget(mean=0.005), True),
        (caught_by(0.01, Action.SHRINK, 0.5, **HALF), Budget(mean=0.05), True),
        (caught_by(0.01, Action.SHRINK, 0.5, **HALF), Budget(mean=0.01), False),
        (caught_by(0.01, Action.SHRINK, 0.5, **HALF), Budget(mean=0.01, slices=0.02), False),
        (caught_by(0.01, Action.SHRINK, 0.5, **HALF), Budget(mean=0.01, slices=0.0126), True),
        (caught_by(0.01, Action.SHRINK, 0.5, **HALF), Budget(mean=0.02), True),
        (caught_by(0.01, Action.SHRINK, 0.5, **HALF), Budget(slices={"a": 0.01}), True),
        (caught_by(0.01, Action.SHRINK, 0.5, budget=Limits(0.01, confidence=0.9)), Budget(mean=0.01), True),
        (caught_by(0.01, Action.SHRINK, 0.5, **CAPPED), Budget(mean=0.01, drift=1.0), True),  # of unknown drift
        (caught_by(0.01, Action.SHRINK, 0.5, **CAPPED, reference_drift=Movement(0.01)), Budget(0.01, drift=1.0), False),
        (INFINITE, Budget(mean=0.01), False),
        (INFINITE, Budget(mean=0.02), True),
        (caught_by(0.01, Action.REJECT, 0.0), Budget(mean=0.02), False),  # as a gate does
        (caught_by(0.01, Action.REJECT, 0.0, **HALF), Budget(mean=0.02), True),
        (caught_by(0.01, Action.STEER, None), Budget(mean=0.01), False),
    ],
)
def test_which_decision_differs(record, budget, differs) -> None:
    assert (replay([record], budget).first_difference is not None) == differs


def test_steps_before_and_after_the_first_difference() -> None:
    records = [
        replace(COMMITTED, step=step, candidate=Movement(kl)) for step, kl in enumerate((0.01, 0.01, 0.03, 0.01))
    ]
    found = replay(records, 0.02)
    assert (found.first_difference, found.before, found.after) == (2, 2, 1)
    found = replay(records, 0.04)
    assert (found.first_difference, found.before, found.after) == (None, 4, 0)
    assert "no step would be decided otherwise" in str(found)


# -- steps that other budgets took -------------------------------------------------------------------------------------

TOL = 1e-3
"""Of the other search: its alpha is at most this part below the largest feasible one."""


def optimizer_of(policy: torch.nn.Module, budget: Budget, controller=None) -> STEPOptimizer:
    observations = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slices = {"left": range(5), "right": range(5, 12)}
    kl = PolicyKL(lambda: policy(observations), slices=slices, noise_floor=False)
    inner = torch.optim.Adam(policy.parameters(), lr=0.05)
    return STEPOptimizer(inner, kl=kl, budget=budget, controller=controller or Interpolate())


def both(own: Budget, other: Budget, controller=None, steps: int = 25) -> Iterator[tuple[StepRecord, StepRecord]]:
    """Steps of a run, and the same steps as a copy takes them under another budget."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
    policy = torch.nn.Sequential(*layers).double()
    optimizer = optimizer_of(policy, own, controller)
    for step in range(steps):
        inputs = torch.randn(16, 4, dtype=torch.float64) * (5 if step % 7 == 3 else 1)
        torch.nn.functional.cross_entropy(policy(inputs), torch.randint(3, (16,))).backward()
        twin = copy.deepcopy(policy)
        way = getattr(controller, "by_layer", None)
        others = optimizer_of(twin, other, Interpolate(search="bisect", tol=TOL, by_layer=way))
        others.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for mine, its in zip(policy.parameters(), twin.parameters(), strict=True):
            its.grad = mine.grad.clone()
        others.step()
        optimizer.step()
        optimizer.zero_grad()
        yield optimizer.last, others.last


def powers(name: str, limits: Limits, *records: StepRecord) -> list[float]:
    """The powers of alpha that a KL was seen to grow with, between all points of a step that were measured."""
    points = [(trial.alpha, trial.movement) for record in records for trial in record.trials if trial.alpha]
    known = [(alpha, limits.reading(name, moved)) for alpha, moved in [*points, (1.0, records[0].candidate)]]
    return [math.log(k / kl) / math.log(a / b) for a, k in known for b, kl in known if a >= 1.05 * b]


@pytest.mark.parametrize(
    ("own", "other", "controller"),
    [
        (Budget(mean=0.02), Budget(mean=0.005), None),
        (Budget(mean=0.003), Budget(mean=0.006), None),
        (Budget(mean=math.inf), Budget(mean=0.005), None),
        (Budget(mean=0.01, slices=0.01), Budget(slices={"left": 0.004}, prompt=0.02), None),
        (Budget(mean=0.01), Budget(mean=0.004), Steer()),
        (Budget(mean=0.02), Budget(mean=0.005), Interpolate(by_layer={"0.*": 0.5})),
        (Budget(mean=0.02, drift=5.0), Budget(mean=0.01, drift=0.1, drift_slices={"left": 0.08}), None),
        (Budget(drift=0.1), Budget(drift=0.06), None),
    ],
)
@pytest.mark.filterwarnings("ignore:.* in a row were rejected")
def test_what_the_other_budget_does_at_every_step(own, other, controller) -> None:
    """A copy of policy and optimizer takes each step under it: caught or not, by what, and how far."""
    steps = list(both(own, other, controller))
    found = {caught.step: caught for caught in replay([record for record, _ in steps], other).caught}
    assert list(found) == [twin.step for _, twin in steps if twin.triggered]
    assert len(found) >= 3
    for record, twin in (both for both in steps if both[1].triggered):
        caught = found[twin.step]
        assert caught.bound == twin.bound
        low, high = caught.interval
        assert low * (1 - TOL) <= twin.alpha <= high
        if caught.bound.startswith("drift") or caught.alpha is None:
            continue
        limits = twin.budget.without_caps()
        over = [name for name, ratio in limits.judge(twin.candidate).ratios.items() if ratio > 1]
        seen = [NEAR_ZERO, *(power for name in over for power in powers(name, limits, record, twin))]
        width = math.log(caught.ratio) * (1 / min(seen) - 1 / max(seen))
        assert -width <= math.log(caught.alpha / twin.alpha) <= width - math.log1p(-TOL)


@pytest.mark.filterwarnings("ignore:.* in a row were rejected")
def test_where_a_drift_meets_its_cap() -> None:
    """The parabola finds it, in steps that begin below the cap; of those that begin beyond it nothing is said.

    Between its ends a parabola of curvature b lies b alpha (1 - alpha) below the straight line. So a curvature that is
    wrong by d moves it by d alpha (1 - alpha), and its root by that over its slope; the copy has measured the true one.
    """
    bends = []
    for cap in (0.02, 0.05, 0.1, 0.2, 0.3):
        for record, twin in both(Budget(mean=0.02, drift=5.0), Budget(drift=cap)):
            for caught in replay([record], Budget(drift=cap)).caught:
                assert (caught.alpha is None) == bool(twin.exceeded_before)
                if caught.alpha is None:
                    continue
                start, end, at = record.previous_drift.mean, record.candidate_drift.mean, twin.alpha
                bend = (start + (end - start) * at - twin.reference_drift.mean) / (at * (1 - at))
                bends.append(bend / record.candidate.mean)
                slope = (cap - start) / caught.alpha  # of the chord to the root: a convex curve is steeper beyond
                off = abs(bend - record.candidate.mean) * at * (1 - at) / slope
                assert abs(caught.alpha - at) <= off + 2 * TOL
    assert len(bends) > 3
    assert all(0.5 < bend < 2 for bend in bends)


# -- logs of older versions --------------------------------------------------------------------------------------------


def test_a_log_of_an_older_version_has_what_it_has() -> None:
    """Without drifts, tails and trials the mean and slices are judged; the rest is refused."""
    old = {
        "step": 3,
        "action": "shrink",
        "candidate": {"mean": 0.04, "slices": {"a": 0.02}},
        "accepted": {"mean": 0.01, "slices": {"a": 0.005}},
        "budget": {"mean": 0.01, "slices": {}, "reference": "Infinity"},
        "triggered": True,
        "bound": "mean",
        "alpha": 0.5,
    }
    record = StepRecord.from_dict(old)
    (caught,) = replay([record], Budget(mean=0.02, slices=0.005)).caught
    assert (caught.bound, caught.interval, caught.alpha) == ("slice:a", (0.5, 1.0), pytest.approx(0.5))
    for budget in (Budget(drift=1.0), Budget(prompt=1.0), Budget(token=1.0)):
        with pytest.raises(ValueError, match="step 3 of the log"):
            replay([record], budget)


# -- what is printed ---------------------------------------------------------------------------------------------------


def climbing(count: int) -> list[StepRecord]:
    kls = [Movement(0.01 * (1 + step % 7), {"a": 0.02}) for step in range(count)]
    return [
        StepRecord(step, Action.COMMIT, kl, kl, Limits(mean=0.065), alpha=1.0, bound="mean", triggered=kl.mean > 0.065)
        for step, kl in enumerate(kls)
    ]


def test_the_report() -> None:
    whose = "whose figures are hypothetical"
    assert str(replay(climbing(7), 0.05)).splitlines() == [
        STEP_LOCAL,
        f"first step that would be decided otherwise: 5 (steps before it: 5; after it: 1, {whose})",
        "2 of 7 steps would have been caught; the run's own budget caught 1",
        "bound by mean              2",
        "alpha                      smallest 0.845, median 0.879",
        "    step  bound                KL / budget    alpha  between            the run's own",
        "       5  mean                         1.2    0.913  0 and 1            commit 1",
        "       6  mean                         1.4    0.845  0 and 1            commit 1",
    ]


def test_the_table_has_the_worst_steps_in_their_order() -> None:
    found = replay(climbing(70), 0.025)
    lines = list(found.lines(12))
    shown = [int(line.split()[0]) for line in lines[6:-1]]
    assert shown == sorted(shown)
    assert len(shown) == 12
    assert {step % 7 for step in shown} == {5, 6}
    assert lines[-1] == "the other 38 caught steps, whose KL / budget is no larger, are left out: --all shows them"
    assert len(list(found.lines(None))) == 6 + 50
    assert len(str(found).splitlines()) == 6 + 20 + 1


def test_the_report_of_alphas_that_are_not_known() -> None:
    unknown, known = replay([drifted(0.3, 0.4)], Budget(drift=0.1)), replay([drifted(0.0, 0.4)], Budget(drift=0.1))
    assert "alpha                      none known, unknown of 1 steps" in str(unknown)
    assert " drift                       1.33        -  0 and 1 " in str(unknown)
    assert "unknown" not in str(known)


def test_as_plain_values() -> None:
    plain = replay(climbing(7), 0.05).to_dict()
    assert plain["step_local"] == STEP_LOCAL
    assert plain["caught_steps"][0] == {
        "step": 5,
        "bound": "mean",
        "ratio": pytest.approx(1.2),
        "alpha": pytest.approx(math.sqrt(1 / 1.2)),
        "interval": [0.0, 1.0],
        "triggered": False,
        "action": "commit",
        "own_alpha": 1.0,
    }
    assert {name: plain[name] for name in ("steps", "triggered", "caught", "first_difference", "before", "after")} == {
        "steps": 7,
        "triggered": 1,
        "caught": 2,
        "first_difference": 5,
        "before": 5,
        "after": 1,
    }
    assert plain["by_constraint"] == {"mean": 2}
    assert plain["alpha_median"] == pytest.approx(0.879, abs=1e-3)
    assert replay(climbing(2), 1.0).to_dict()["alpha_min"] is None


# -- command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        (["0.01"], Budget(mean=0.01)),
        (["mean=inf"], Budget(mean=math.inf)),
        (
            ["slices=0.02", "drift=0.05", "prompt=0.5", "token=2"],
            Budget(slices=0.02, drift=0.05, prompt=0.5, token=2.0),
        ),
        (["slice:b=0.005"], Budget(slices={"b": 0.005})),
        (["slices=0.02", "slice:b=0.005"], Budget(slices={"a": 0.02, "b": 0.005})),
        (["drift:a=0.1", "drift:x:y=z=0.2"], Budget(drift_slices={"a": 0.1, "x:y=z": 0.2})),
    ],
)
def test_budgets_in_words(words, budget) -> None:
    assert read_budget(words, ["a", "b"]) == budget


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.jsonl"], "--budget run.jsonl: 'run.jsonl' is no number .* write mean=0.01"),
        (["mean="], "--budget mean=: '' is no number"),
        (["confidence=0.9"], "'confidence' is no limit of a budget that a log can answer; write mean=0.01"),
        (["slice:=0.9"], "'slice:' is no limit"),
        (["slices:a=0.9"], "'slices:a' is no limit"),
        (["mean:a=0.9"], "'mean:a' is no limit"),
        (["0.1", "mean=0.2"], "--budget mean=0.2: mean has a limit already, 0.1"),
        (["mean=-1"], "budget.mean=-1.0 must be a KL >= 0"),
        (["slice:a=nan"], r"budget.slices\['a'\]=nan must be a KL"),
    ],
)
def test_words_that_are_no_budget(words, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_budget(words, ["a"])


@pytest.fixture
def log(tmp_path) -> str:
    writer = JSONLWriter(tmp_path / "run.jsonl", dict)
    for record in climbing(70):
        writer(record)
    return str(tmp_path / "run.jsonl")


def test_the_command_replays_every_log(log, capsys) -> None:
    words = ["--budget", "mean=0.03", "slices=0.05", "--budget", "slice:a=0.01"]
    assert main(["replay", log, f"again={log}", *words]) == 0
    found = replay(climbing(70), Budget(mean=0.03, slices={"a": 0.01}))
    lines = [f"  {line}" for line in str(found).splitlines()]
    assert capsys.readouterr().out.splitlines() == [log, *lines, "again", *lines]
    assert lines[-1].endswith("--all shows them")
    assert main(["replay", log, "--all", *words]) == 0
    assert capsys.readouterr().out.splitlines() == [log, *(f"  {line}" for line in found.lines(None))]


def test_the_command_prints_one_object(log, capsys) -> None:
    assert main(["replay", f"x={log}", "--budget", "0.03", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"x": json.loads(json.dumps(replay(climbing(70), 0.03).to_dict()))}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["oops=1"], "'oops' is no limit of a budget"),
        (["slice:b=0.1"], "run.jsonl: budget.slices limits 'b', and step 0 of the log has the slices ['a']"),
        (["drift=0.1"], "run.jsonl: budget caps the drift"),
    ],
)
def test_the_command_says_what_is_wrong(log, capsys, words, message) -> None:
    assert main(["replay", log, "--budget", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--budget"]])
def test_the_command_needs_a_budget(log, arguments) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["replay", log, *arguments])
    assert stopped.value.code == 2


def test_a_rejection_by_a_used_up_path_differs() -> None:
    """The other budget has no such cap; what it would have committed nobody knows from the run's decision."""
    used_up = Limits(mean=0.0, path=0.01, lowered=("mean",))
    record = StepRecord(0, Action.REJECT, Movement(0.02), Movement(0.0), used_up, True, "path", alpha=0.0)
    assert replay([record], Budget(mean=0.005)).first_difference == 0


def test_slices_that_come_and_go_are_limited_where_they_are() -> None:
    """A name that no step has is refused still."""
    steps = [
        StepRecord(step, Action.COMMIT, moved, moved, Limits())
        for step, moved in enumerate((Movement(0.01, {"a": 0.01}), Movement(0.02, {"a": 0.01, "b": 0.03})))
    ]
    found = replay(steps, read_budget(["slices=0.015", "slice:a=0.02"], ["a", "b"]))
    assert [(caught.step, caught.bound) for caught in found.caught] == [(1, "slice:b")]
    with pytest.raises(ValueError, match=r"budget\.slices limits 'c'"):
        replay(steps, Budget(slices={"c": 0.01}))


def test_a_log_without_steps_is_refused(tmp_path, capsys) -> None:
    """No budget would have caught any."""
    (tmp_path / "run.jsonl").write_text('{"step_optim": 1}\n')
    assert main(["replay", str(tmp_path / "run.jsonl"), "--budget", "0.01"]) == 2
    assert "the log has no steps" in capsys.readouterr().err
