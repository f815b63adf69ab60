"""The searches for the largest feasible alpha, on synthetic families of K(alpha) with a known answer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from step_optim.controllers.search import largest_feasible
from tests import reference

TOL = 0.01
SEARCHES = ["model", "bisect", "backtrack"]

Curve = Callable[[float], float]
"""K(alpha) / eps of one constraint."""


@dataclass(frozen=True)
class Audited:
    """A point as a search sees it."""

    ratios: Mapping[str, float]

    @property
    def feasible(self) -> bool:
        """All ratios at most 1; NaN is not."""
        return all(ratio <= 1 for ratio in self.ratios.values())


@dataclass
class Problem:
    """Some constraints, and a record of the alphas that were audited."""

    curves: list[Curve]
    asked: list[float] = field(default_factory=list)

    def at(self, alpha: float) -> Audited:
        """Ratios without counting."""
        return Audited({f"slice:{j}": curve(alpha) for j, curve in enumerate(self.curves)})

    def measure(self, alpha: float) -> Audited:
        """One audit."""
        self.asked.append(alpha)
        return self.at(alpha)

    @property
    def best(self) -> float:
        """alpha*, by the dense grid of the oracle."""
        return reference.largest_alpha(lambda alpha: self.at(alpha).feasible)

    def solve(self, search: str, tol: float = TOL, max_trials: int = 200, strict: bool = False) -> float | None:
        """The alpha that a search answers with; it must have been audited, feasible, and reported as it was."""
        self.asked = []
        found = largest_feasible(
            self.measure, self.at(1.0), search=search, tol=tol, max_trials=max_trials, strict=strict
        )
        if found is None:
            return None
        alpha, point = found
        assert alpha in self.asked
        assert point == self.at(alpha)
        assert point.feasible
        assert alpha == max(a for a in self.asked if self.at(a).feasible)
        return alpha


@st.composite
def powers(draw: st.DrawFn, least: float = 0.5) -> Curve:
    """Sums of one to three powers of alpha between ``least`` and 4."""
    terms = draw(
        st.lists(st.tuples(st.floats(least, 4), st.floats(0.01, 10)), min_size=1, max_size=3).map(
            lambda parts: [(p, c / sum(c for _, c in parts)) for p, c in parts]
        )
    )
    at_one = 10 ** draw(st.floats(-1, 4))
    return lambda alpha: at_one * sum(c * alpha**p for p, c in terms)


@st.composite
def quadratics(draw: st.DrawFn) -> Curve:
    """alpha² with a bend of up to 30 % over the whole step: what real candidates look like."""
    at_one, bend = 10 ** draw(st.floats(-1, 3)), draw(st.floats(-0.3, 0.3))
    return lambda alpha: at_one * alpha**2 * math.exp(bend * (alpha - 1))


@st.composite
def saturating(draw: st.DrawFn) -> Curve:
    """Quadratic first, flat in the end: a policy that has collapsed onto one token cannot move further."""
    at_one, knee = 10 ** draw(st.floats(-1, 4)), 10 ** draw(st.floats(-2, 0))
    shape = lambda alpha: alpha**2 / (knee**2 + alpha**2)  # noqa: E731
    return lambda alpha: at_one * shape(alpha) / shape(1.0)


def triggered(curves: list[Curve]) -> Problem:
    """A problem whose candidate is infeasible and whose answer is within reach."""
    problem = Problem(curves)
    assume(not problem.at(1.0).feasible)
    assume(problem.at(1e-6).feasible)
    return problem


monotone = st.lists(powers() | quadratics() | saturating(), min_size=1, max_size=4)


def within_tol(alpha: float | None, best: float, tol: float = TOL) -> bool:
    """Whether alpha is feasible's near side: at most alpha*, and within tol of it."""
    return alpha is not None and (1 - tol) * best * (1 - 1e-9) <= alpha <= best * (1 + 1e-9)


@pytest.mark.parametrize("search", SEARCHES)
@settings(max_examples=60)
@given(curves=monotone, tol=st.sampled_from([0.3, 0.1, 0.01, 0.001]))
def test_within_tol_of_the_largest_feasible_alpha(search, curves, tol) -> None:
    """On monotone problems with several constraints every search is within tol of the dense-grid answer."""
    problem = triggered(curves)
    assert within_tol(problem.solve(search, tol, strict=True), problem.best, tol)


steep = st.lists(powers(least=2) | quadratics() | saturating(), min_size=1, max_size=4)


@settings(max_examples=120)
@given(curves=steep, tol=st.sampled_from([0.3, 0.1, 0.01, 0.001]))
def test_the_stop_on_the_slope_where_kl_is_at_least_quadratic(curves, tol) -> None:
    """Real curves fall at least like alpha² near theta_t; where they are flat in the end it is off by a part of tol."""
    problem = triggered(curves)
    assert within_tol(problem.solve("model", tol), problem.best, 1.2 * tol)


@pytest.mark.parametrize("search", SEARCHES)
@settings(max_examples=60)
@given(curves=monotone, tol=st.sampled_from([0.3, 0.01]), strict=st.booleans())
def test_alpha_stays_between_its_ends(search, curves, tol, strict) -> None:
    """No audit is asked for at or beyond 0 and 1, and none twice."""
    problem = triggered(curves)
    problem.solve(search, tol, strict=strict)
    assert all(0 < alpha < 1 for alpha in problem.asked)
    assert len(set(problem.asked)) == len(problem.asked)


@settings(max_examples=100)
@given(curves=st.lists(powers() | quadratics(), min_size=1, max_size=4))
def test_model_needs_few_audits_more_than_bisection_at_worst(curves) -> None:
    """Whatever mixture of powers the constraints are, the model search never pays more than its own four trials."""
    problem = triggered(curves)
    problem.solve("bisect")
    bisections = len(problem.asked)
    problem.solve("model")
    assert len(problem.asked) <= bisections + 4


@pytest.mark.parametrize(
    ("at_one", "powers_", "share"),
    [(5, (0.5, 4), 0.5), (10, (0.5, 1), 0.01), (300, (1, 4), 0.01), (1000, (1, 4), 0.01)],
)
def test_model_needs_no_more_audits_than_bisection(at_one, powers_, share) -> None:
    """Neither does it on mixtures of two powers with a bend in between."""
    low, high = powers_
    problem = Problem([lambda alpha: at_one * (share * alpha**low + (1 - share) * alpha**high)])
    problem.solve("bisect")
    bisections = len(problem.asked)
    problem.solve("model")
    assert len(problem.asked) <= bisections


@pytest.mark.parametrize(
    ("over", "low", "edge", "high"),
    [(111.72, 0.37, 0.27, 2369.3), (90.79, 0.58, 0.52, 446.7), (66.97, 0.61, 0.84, 550.9)],
)
def test_a_slice_that_jumps_next_to_one_that_does_not(over, low, edge, high) -> None:
    """A model that aims at the point that it has already audited neither asks again nor divides by zero."""
    problem = Problem([lambda alpha: over * alpha**2, lambda alpha: low if alpha <= edge else high])
    assert within_tol(problem.solve("model"), problem.best)


def test_strict_mode_costs_about_one_more_audit() -> None:
    """What the documentation of ``strict`` says, on quadratic-like problems."""
    used = {False: 0, True: 0}
    for over in (1.3, 2, 5, 20, 100):
        for bend in (-0.3, 0.0, 0.3):
            for strict in used:
                problem = Problem([bent(over, bend)])
                assert within_tol(problem.solve("model", strict=strict), problem.best)
                used[strict] += len(problem.asked)
    assert used[True] <= used[False] + 1.5 * 15


@settings(max_examples=150)
@given(curves=st.lists(quadratics(), min_size=1, max_size=4))
def test_model_needs_four_audits_at_most_on_quadratic_problems(curves) -> None:
    """Where K is nearly proportional to alpha², four audits are always enough, whatever constraint takes over."""
    problem = triggered(curves)
    problem.solve("model")
    assert len(problem.asked) <= 4


def bent(over: float, bend: float) -> Curve:
    """A quadratic with a bend, ``over`` times its budget at alpha = 1."""
    return lambda alpha: over * alpha**2 * math.exp(bend * (alpha - 1))


def test_audits_on_average() -> None:
    """Over a grid of quadratic-like problems with crossing constraints: 2.6 audits on average, bisection above 7."""
    problems = [
        Problem([bent(over, bend), bent(over * share, -bend)])
        for over in (1.02, 1.3, 2, 5, 20, 100, 500)
        for bend in (-0.6, -0.3, -0.1, 0.0, 0.1, 0.3, 0.6)
        for share in (0.5, 0.95, 1.05)
    ]
    used: dict[str, list[int]] = {"model": [], "bisect": []}
    for problem in problems:
        for search, counts in used.items():
            assert within_tol(problem.solve(search), problem.best)
            counts.append(len(problem.asked))
    mean = {search: sum(counts) / len(counts) for search, counts in used.items()}
    assert mean["model"] <= 2.6
    assert mean["bisect"] > 7
    assert max(used["model"]) <= 5


@pytest.mark.parametrize("search", SEARCHES)
@given(edge=st.floats(0.001, 0.999), low=st.floats(0, 0.99), high=st.floats(1.01, 1e6))
def test_step_functions_in_strict_mode(search, edge, low, high) -> None:
    """Flat, then a jump: with a real bracket every search still ends within tol of the jump."""
    problem = Problem([lambda alpha: low if alpha <= edge else high])
    assert within_tol(problem.solve(search, strict=True), edge)


@given(edge=st.floats(0.01, 0.99), high=st.floats(1.01, 1e6))
def test_the_slope_stop_is_off_where_the_curve_is_flat(edge, high) -> None:
    """A curve that shows the model no slope at all is not stopped early by default either."""
    problem = Problem([lambda alpha: 0.5 if alpha <= edge else high])
    alpha = problem.solve("model")
    assert alpha is not None
    assert alpha <= edge


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("strict", [False, True], ids=["slope", "strict"])
@pytest.mark.parametrize("search", SEARCHES)
@given(edge=st.floats(0.001, 0.999), power=st.floats(0.5, 4), at_edge=st.floats(0.01, 50))
@example(edge=0.484375, power=0.984375, at_edge=1.890625)  # all but the answer is beyond the edge
def test_a_candidate_that_overflows(search, strict, broken, edge, power, at_edge) -> None:
    """NaN or inf from some alpha on is infeasible there, and the answer is still the largest feasible alpha."""
    problem = Problem([lambda alpha: at_edge * (alpha / edge) ** power if alpha < edge else broken, lambda alpha: 0.0])
    alpha, best = problem.solve(search, strict=strict), problem.best
    assert alpha is not None
    assert alpha <= best
    if strict or search != "model" or at_edge > 1:
        assert within_tol(alpha, best)


@pytest.mark.parametrize("search", SEARCHES)
@given(edge=st.floats(0.01, 0.99))
def test_all_ratios_nan_at_one(search, edge) -> None:
    """A candidate without a single finite figure leaves nothing to model: bisection takes over."""
    problem = Problem([lambda a: math.nan if a > edge else (a / edge) ** 2, lambda a: math.nan if a > edge else a])
    assert within_tol(problem.solve(search, strict=True), edge)


@pytest.mark.parametrize("search", SEARCHES)
@given(curves=monotone, max_trials=st.integers(1, 8), tol=st.sampled_from([0.1, 1e-6]))
def test_max_trials(search, curves, max_trials, tol) -> None:
    """No search audits more than it may; what it then has is feasible, or None."""
    problem = triggered(curves)
    alpha = problem.solve(search, tol, max_trials)
    assert len(problem.asked) <= max_trials
    assert (alpha is None) == (not any(problem.at(asked).feasible for asked in problem.asked))


@pytest.mark.parametrize("search", SEARCHES)
@given(floor=st.floats(1.001, 1e3), max_trials=st.integers(1, 30))
def test_nothing_feasible(search, floor, max_trials) -> None:
    """A constraint that even the smallest step breaks (drift is used up) ends in None after max_trials audits."""
    problem = Problem([lambda alpha: floor + alpha])
    assert problem.solve(search, max_trials=max_trials) is None
    assert len(problem.asked) == max_trials


@pytest.mark.parametrize("search", SEARCHES)
@given(base=st.floats(0.0, 0.999), slope=st.floats(1.5, 100))
def test_a_constraint_that_does_not_start_at_zero(search, base, slope) -> None:
    """Drift from pi_ref is above 0 at alpha = 0 already: the model does not fit it, and the answer holds anyway."""
    problem = triggered([lambda alpha: base + slope * alpha**2])
    assert within_tol(problem.solve(search, strict=True), problem.best)


@given(base=st.floats(0.0, 0.99), slope=st.floats(1.5, 100))
def test_the_slope_stop_on_drift(base, slope) -> None:
    """Without strict, on curves that h = sqrt(K) / alpha falls on, the stop is off by a fraction of tol at most."""
    problem = triggered([lambda alpha: base + slope * alpha**2, lambda alpha: 0.3 * alpha**2])
    assert within_tol(problem.solve("model"), problem.best, 1.2 * TOL)


@pytest.mark.parametrize("search", SEARCHES)
@given(over=st.floats(1.0001, 1.02))
def test_just_over_the_budget(search, over) -> None:
    """A candidate a hair over its budget keeps 99 % of its step or more."""
    problem = Problem([lambda alpha: over * alpha**2])
    assert within_tol(problem.solve(search), over**-0.5)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("over", [1e4, 1e6, 1e8])
def test_far_over_the_budget(search, over) -> None:
    """The answer may be a ten-thousandth of the step."""
    assert within_tol(Problem([lambda alpha: over * alpha**2]).solve(search), over**-0.5)


def test_default_trials_reach_a_ten_thousandth() -> None:
    """The 24 trials that `Interpolate` allows are enough for alpha = 1e-4 with every search."""
    for search in SEARCHES:
        assert within_tol(Problem([lambda alpha: 1e8 * alpha**2]).solve(search, max_trials=24), 1e-4)


@given(curves=monotone)
def test_backtracking_alone(curves) -> None:
    """With tol = 0.5 "backtrack" is the paper's: halve until feasible, and stop there."""
    problem = triggered(curves)
    alpha = problem.solve("backtrack", tol=0.5)
    assert problem.asked == [0.5**k for k in range(1, len(problem.asked) + 1)]
    assert alpha == problem.asked[-1]


@given(curves=monotone)
def test_bisection_halves(curves) -> None:
    """Every audit of "bisect" is in the middle of what is still possible."""
    problem = triggered(curves)
    problem.solve("bisect")
    low, high = 0.0, 1.0
    for alpha in problem.asked:
        assert alpha == 0.5 * (low + high)
        low, high = (alpha, high) if problem.at(alpha).feasible else (low, alpha)


@given(zero=st.integers(0, 2), over=st.floats(1.1, 100))
def test_constraints_that_do_not_move(zero, over) -> None:
    """Slices that read exactly 0 do not disturb the model."""
    curves: list[Curve] = [lambda alpha: 0.0, lambda alpha: 0.0]
    curves.insert(zero, lambda alpha: over * alpha**2)
    problem = Problem(curves)
    assert within_tol(problem.solve("model"), over**-0.5)
    assert len(problem.asked) <= 2


@given(noise=st.floats(0, 0.004), over=st.floats(1.1, 100), seed=st.integers(0, 1000))
def test_rounding_noise(noise, over, seed) -> None:
    """A little noise in K, as bf16 weights make it, costs a little accuracy and nothing else."""
    import random

    values: dict[float, float] = {}
    drawn = random.Random(seed)

    def noisy(alpha: float) -> float:
        return values.setdefault(alpha, over * alpha**2 * (1 + noise * drawn.uniform(-1, 1)))

    problem = triggered([noisy])
    alpha = problem.solve("model", max_trials=24)
    assert alpha is not None
    assert problem.at(alpha).feasible
    assert alpha == pytest.approx(over**-0.5, rel=2 * TOL)
