"""How far figures over prompts carry: quantiles, standard errors, and what confidence bounds cover."""

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from step_optim import Budget, Movement
from step_optim.limits import Limits
from step_optim.precision import relative_error, student_quantile, upper_bound

kls = st.lists(st.floats(1e-12, 1e3), min_size=2, max_size=40)
confidences = st.floats(0.5, 0.995)


def student_cdf(t: float, freedom: int) -> float:
    """By Simpson's rule over the density: slow and obvious."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    steps = 4000
    width = t / steps
    total = 0.0
    for k in range(steps + 1):
        weight = 1 if k in (0, steps) else 4 if k % 2 else 2
        total += weight * math.exp(log_scale - (freedom + 1) / 2 * math.log1p((k * width) ** 2 / freedom))
    return 0.5 + total * width / 3


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 8, 31, 200, 201, 255, 1000])
@pytest.mark.parametrize("probability", [0.5, 0.75, 0.95, 0.99])
def test_students_quantile_inverts_the_integral_of_the_density(freedom, probability) -> None:
    assert student_cdf(student_quantile(probability, freedom), freedom) == pytest.approx(probability, abs=1e-7)


def textbook_bound(values: list[float], confidence: float) -> float:
    """Hall's bound once more: the transformation T(W) = W + g W²/3 + g² W³/27 + g/6n, inverted by bisection."""
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
    skewness = n * sum(((x - mean) / deviation) ** 3 for x in values) / ((n - 1) * (n - 2))

    def transformed(w: float) -> float:
        return w + skewness * w**2 / 3 + skewness**2 * w**3 / 27 + skewness / (6 * n)

    low, high = -100.0, 100.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (
            (middle, high)
            if transformed(middle) < -student_quantile(confidence, n - 1) / math.sqrt(n)
            else (
                low,
                middle,
            )
        )
    return mean * max(1.0, 1 - deviation / mean * low * (1 + 3 / n))


@given(values=st.lists(st.floats(0.1, 10), min_size=4, max_size=20, unique=True), confidence=confidences)
def test_the_bound_is_halls(values, confidence) -> None:
    assert upper_bound(values, confidence) == pytest.approx(textbook_bound(values, confidence), rel=1e-6)


@given(values=kls, confidence=confidences, scale=st.sampled_from([1e-150, 1e-3, 7.0]))
def test_bounds_are_above_the_mean_and_in_proportion(values, confidence, scale) -> None:
    """So that a search that shortens a step shortens the bound as it does the mean."""
    bound = upper_bound(values, confidence)
    assert bound >= sum(values) / len(values) * (1 - 1e-12)
    assert upper_bound([scale * x for x in values], confidence) == pytest.approx(scale * bound, rel=1e-6)
    assert upper_bound(sorted(values), confidence) == pytest.approx(bound, rel=1e-9)


@given(values=kls, confidence=st.tuples(confidences, confidences))
def test_more_confidence_is_a_higher_bound(values, confidence) -> None:
    low, high = sorted(confidence)
    assert upper_bound(values, low) <= upper_bound(values, high) * (1 + 1e-12)


def test_bounds_of_little() -> None:
    """One value says nothing of the spread; equal ones have none; what is not finite stays so."""
    assert upper_bound([0.1], 0.95) == math.inf
    assert upper_bound([0.25, 0.25, 0.25], 0.95) == 0.25
    assert upper_bound([0.0, 0.0], 0.95) == 0.0
    assert math.isnan(upper_bound([math.nan, 1.0], 0.95))
    assert upper_bound([math.inf, 1.0], 0.95) == math.inf
    assert relative_error([0.1]) == math.inf
    assert relative_error([0.0, 0.0]) == 0.0


POPULATIONS = {
    "log-normal, spread 0.5": lambda rng: rng.lognormvariate(-0.125, 0.5),
    "log-normal, spread 0.6": lambda rng: rng.lognormvariate(-0.18, 0.6),
    "gamma, shape 3": lambda rng: rng.gammavariate(3.0, 1 / 3),
    "exponential": lambda rng: rng.expovariate(1.0),
}
"""Mean 1. Per-prompt KLs of real steps are between the first and the third (spread of the logarithm 0.56 to 0.59, and
0.54 of the mean: 84 prompts, the 135M model of the demo under LoRA)."""


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("prompts", [8, 16, 64, 256])
def test_bounds_cover_the_mean_of_the_population(population, prompts) -> None:
    """In 95 of 100 samples, to what 1,500 samples can tell (three standard errors, 0.017)."""
    rng, draw, samples = random.Random(prompts), POPULATIONS[population], 1500
    covered = sum(upper_bound([draw(rng) for _ in range(prompts)], 0.95) >= 1.0 for _ in range(samples))
    assert covered / samples >= 0.95 - 0.017


def test_the_mean_alone_covers_half() -> None:
    """What a budget without confidence promises of other prompts."""
    rng, samples = random.Random(0), 2000
    means = [sum(rng.lognormvariate(-0.18, 0.6) for _ in range(16)) / 16 for _ in range(samples)]
    assert 0.35 <= sum(mean >= 1.0 for mean in means) / samples <= 0.55


def test_precision_of_a_movement() -> None:
    """Standard errors over the mean, and the prompts that a wanted one takes; 1/sqrt(n) rules."""
    moved = Movement.over([0.1, 0.2, 0.3, 0.6], {"a": [0, 1], "b": [2]}, spans={"opening": [0.5, 0.7]})
    precision = moved.precision
    deviation = math.sqrt(sum((x - 0.3) ** 2 for x in (0.1, 0.2, 0.3, 0.6)) / 3)
    assert precision.mean == pytest.approx(deviation / 2 / 0.3)
    assert precision.slices["a"] == pytest.approx(0.05 / 0.15)
    assert precision.slices["opening"] == pytest.approx(0.1 / 0.6)
    assert precision.slices["b"] == math.inf
    wanted = precision.prompts_for(precision.mean / 3)
    assert wanted["mean"] == 36
    assert wanted["b"] is None
    assert precision.prompts_for(100.0)["a"] == 2
    assert str(precision).startswith("mean ±36% (4 prompts), a ±33% (2 prompts)")
    with pytest.raises(ValueError, match="error=0 must be above 0"):
        precision.prompts_for(0)
    with pytest.raises(ValueError, match="this movement has means only"):
        _ = Movement(0.1).precision


@given(values=st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=12), limit=st.floats(1e-6, 2.0), data=st.data())
def test_limits_hold_bounds_against_budgets(values, limit, data) -> None:
    """With confidence the bound decides, for the mean, slices and drift; the tails are what they are."""
    members = {"a": data.draw(st.lists(st.integers(0, len(values) - 1), min_size=2, max_size=4, unique=True))}
    moved = Movement.over(values, members, token=2.0)
    limits = Limits(limit, {"a": limit}, limit, {"a": limit}, prompt=limit, token=limit, confidence=0.9)
    part = upper_bound([values[i] for i in members["a"]], 0.9)
    figures = {"mean": upper_bound(values, 0.9), "slice:a": part, "prompt": max(values), "token": 2.0}
    figures |= {"drift": figures["mean"], "drift:a": part}
    verdict = limits.judge(moved, moved)
    assert verdict.ratios == pytest.approx({name: kl / limit for name, kl in figures.items()})
    assert verdict.feasible == all(kl <= limit for kl in figures.values())
    bounds = {name: kl for name, kl in figures.items() if name not in ("prompt", "token")}
    assert limits.bounds(moved, moved) == pytest.approx(bounds)
    assert limits.exceeded_by(moved) == tuple(name for name in ("drift", "drift:a") if figures[name] > limit)
    lowered = limits.on_the_way_back(moved)
    assert lowered.judge(moved, moved).ratios.get("drift", 0) <= 1 + 1e-9
    assert limits.at_rest(moved).ratios["drift"] == verdict.ratios["drift"]
    assert limits.at_rest(moved).ratios["mean"] == 0


@given(
    prompts=st.lists(st.floats(1e-6, 1), min_size=2, max_size=6), processes=st.integers(2, 4), seed=st.integers(0, 9)
)
def test_what_all_processes_have_measured_counts_once(prompts, processes, seed) -> None:
    """Replicas have the bounds and the precision of one process, though rounding tells them apart."""
    rng, members = random.Random(seed), {"a": [0, 1]}
    alone = Movement.over(prompts, members, token=1.0, spans={"end": prompts})
    near = [[kl * (1 + 1e-7 * rng.random()) for kl in prompts] for _ in range(processes)]
    parts = [Movement.over(part, members, token=1.0, spans={"end": part}) for part in near]
    pooled = Movement.pooled(parts, replicas=True)
    assert pooled.upper(0.9) == pytest.approx(alone.upper(0.9), rel=1e-5)
    assert pooled.upper(0.9, "end") == pytest.approx(alone.upper(0.9, "end"), rel=1e-5)
    assert pooled.precision.prompts == len(prompts)
    assert pooled.mean == pytest.approx(alone.mean, rel=1e-6)
    assert Movement.pooled([alone] * processes).upper(0.9) == alone.upper(0.9)


def test_confidence_needs_a_mean_to_be_about() -> None:
    with pytest.raises(ValueError, match="is about means, and only prompt= or token= is limited"):
        Budget(prompt=0.1, confidence=0.9)


@pytest.mark.parametrize("value", [0.4, 1.0, -1, math.nan, "0.9", True])
def test_a_confidence_that_is_none(value) -> None:
    with pytest.raises((ValueError, TypeError), match="confidence"):
        Budget(mean=0.1, confidence=value)


@pytest.mark.parametrize("part", ["prompt", "token"])
@pytest.mark.parametrize("value", [-1.0, math.nan, "much"])
def test_a_tail_budget_that_is_none(part, value) -> None:
    with pytest.raises((ValueError, TypeError), match=f"budget.{part}="):
        Budget(**{part: value})


@given(parts=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=2, max_size=4))
def test_pooled_tails_and_spans_are_those_of_all(parts) -> None:
    """However prompts are spread over processes."""
    assume(any(part != parts[0] for part in parts))  # equal ones are taken for replicas
    moved = [Movement.over(part, {}, token=2 * max(part), spans={"end": part[1:]}) for part in parts]
    pooled, every = Movement.pooled(moved), [kl for part in parts for kl in part]
    assert pooled.prompt == max(every)
    assert pooled.token == 2 * max(every)
    ends = [kl for part in parts for kl in part[1:]]
    assert pooled.slices["end"] == Movement.over(ends, {}).mean
    assert pooled.upper(0.9) == Movement.over(every, {}).upper(0.9)
