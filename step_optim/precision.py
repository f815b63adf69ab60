"""How far figures over some prompts carry: standard errors, and upper confidence bounds of a mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

FEW = 3.0
"""The margin above the mean grows by 1 + FEW / n. Without it the bound at 0.95 covered 0.91 of the true means at 8
prompts and 0.94 at 64, in simulations with the spread of real per-prompt KLs; with it 0.95 (see `upper_bound`)."""

NORMAL_95 = 1.959964
"""Standard errors on each side of a normal 95 % interval."""

EXACT = 200
"""Degrees of freedom up to which Student's distribution is summed exactly; beyond, a series is good to 1e-9."""


def upper_bound(values: Sequence[float], confidence: float) -> float:
    """Return an upper confidence bound of the mean of a population, from a sample of it.

    KLs of prompts are positive and skewed: a few prompts move much more than
    most. Student's bound is below the true mean too often then, for a sample
    without such prompts has a small mean and a small spread at once. Hall's
    transformation (P. Hall, On the removal of skewness by transformation, J.
    R. Statist. Soc. B 54, 1992, 221-228) takes the skewness out of the
    studentized mean. With n values of mean m, standard deviation s and sample
    skewness g, and Student's quantile t at n - 1 degrees of freedom:

        b = -t / sqrt(n) - g / (6 n)
        bound = m + s (3 / g) (1 - (1 + g b)^(1/3)) (1 + FEW / n)

    Args:
        values: n of them; at least two.
        confidence: how often, over samples, the bound should be above the true mean.

    Returns:
        The bound, at least the sample's mean. In proportion to the values: twice the KLs, twice the bound.

    >>> values = [0.01, 0.02, 0.015, 0.06]
    >>> upper_bound(values, 0.95) > upper_bound(values, 0.5) > 0.026
    True
    """
    count, mean = len(values), _mean(values)
    if count < 2:
        return math.inf
    if mean == 0 or not math.isfinite(mean):
        return mean
    spread, skewness = _shape([value / mean for value in values])
    b = -student_quantile(confidence, count - 1) / math.sqrt(count) - skewness / (6 * count)
    margin = -b if abs(skewness) < 1e-6 else 3 / skewness * (1 - _cube_root(1 + skewness * b))
    return mean * max(1.0, 1 + spread * margin * (1 + FEW / count))


def relative_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean over the mean; inf for a single value, 0 where all of them are 0."""
    count, mean = len(values), _mean(values)
    if mean == 0:
        return 0.0
    if count < 2 or not math.isfinite(mean):
        return math.inf
    return _shape([value / mean for value in values])[0] / math.sqrt(count)


def widened(count: int) -> float:
    """Return how many times as wide as the normal 95 % interval Student's is, over some prompts.

    >>> round(widened(5), 2), round(widened(200), 2)
    (1.42, 1.01)
    """
    return math.inf if count < 2 else student_quantile(0.975, count - 1) / NORMAL_95


def ratio_interval(ratio: float, error: float) -> tuple[float, float]:
    """Return the ends of a ratio's 95 % interval.

    Args:
        ratio: above 0.
        error: the standard error of its logarithm.
    """
    return ratio * math.exp(-NORMAL_95 * error), ratio * math.exp(NORMAL_95 * error)


@dataclass(frozen=True)
class Precision:
    """How far a movement carries beyond the prompts that it was measured on.

    >>> precision = Precision(0.2, {"math": 0.5}, 25, {"math": 5})
    >>> precision.prompts_for(0.1)
    {'mean': 100, 'math': 125}
    """

    mean: float
    """Relative standard error of K_global over prompts: 0.1 says that the mean over other prompts like these differs by
    10 %, one standard deviation. Four times as many prompts halve it."""

    slices: Mapping[str, float]
    """The same of each slice."""

    prompts: int
    """C, the number of prompts."""

    slice_prompts: Mapping[str, int]
    """The number of prompts in each slice."""

    def prompts_for(self, error: float) -> dict[str, int | None]:
        """Return how many prompts a wanted relative standard error takes, for "mean" and each slice.

        Args:
            error: above 0; 0.1 is 10 %.

        Returns:
            At least 2 each. None where a single prompt says nothing about the spread.

        Raises:
            ValueError: ``error`` is not above 0.
        """
        if not error > 0:
            raise ValueError(f"error={error} must be above 0; 0.1 is 10 % of the mean")
        known = [("mean", self.mean, self.prompts)]
        known += [(name, now, self.slice_prompts[name]) for name, now in self.slices.items()]
        return {
            name: max(2, math.ceil(count * (now / error) ** 2 - 1e-9)) if math.isfinite(now) else None
            for name, now, count in known
        }

    def __str__(self) -> str:
        parts = [f"{name} ±{error:.0%} ({self.slice_prompts[name]} prompts)" for name, error in self.slices.items()]
        return ", ".join([f"mean ±{self.mean:.0%} ({self.prompts} prompts)", *parts])


@lru_cache(maxsize=256)
def student_quantile(probability: float, freedom: int) -> float:
    """Return Student's t quantile, for a probability of at least 0.5.

    >>> round(student_quantile(0.95, 7), 4), round(student_quantile(0.975, 300), 4)
    (1.8946, 1.9679)
    """
    z = NormalDist().inv_cdf(probability)
    if freedom > EXACT:  # Cornish and Fisher's expansion
        terms = (
            z,
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        )
        return math.fsum(term / freedom**power for power, term in enumerate(terms))
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return 0.5 * (low + high)


def _student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0, a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    central = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + 0.5 * central


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _shape(values: Sequence[float]) -> tuple[float, float]:
    """Standard deviation and sample skewness; 0 for what too few values cannot tell."""
    count, mean = len(values), _mean(values)
    off = [value - mean for value in values]
    deviation = math.sqrt(math.fsum(x * x for x in off) / (count - 1))
    if count < 3 or deviation == 0:
        return deviation, 0.0
    return deviation, count * math.fsum((x / deviation) ** 3 for x in off) / ((count - 1) * (count - 2))


def _cube_root(x: float) -> float:
    return math.copysign(abs(x) ** (1 / 3), x)
