"""Differences between two conditions, paired by seed: interval, exact test, effect size, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
"""Resamples of the bootstrap, and signs drawn where there are too many to go through."""

SEED = 20_260
"""Of both: equal data give equal figures."""

ENUMERABLE = 20
"""Pairs up to which all signs are gone through: 2^20 sums."""

SEEDS_FOR_WORDS = 3
"""Pairs below which no difference is called one: an interval of two is the two."""

SEEDS_FOR_P = 6
"""Pairs below which the sign-flip test cannot reach .05: its smallest p is 2^(1-n)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Contrast:
    """A difference of means, paired. None where it is not defined: intervals and tests need two pairs."""

    pairs: tuple[Hashable, ...]
    """what the pairs share (seeds, say)"""
    differences: tuple[float, ...]
    """condition - baseline, for each"""
    mean: float | None = None
    low: float | None = None
    """percentile bootstrap of the mean, 95 %"""
    high: float | None = None
    p: float | None = None
    """two-sided sign-flip test"""
    holm: float | None = None
    """p after Holm's correction over the family; None if none was made"""
    effect: float | None = None
    """d_z: mean over standard deviation of the differences; infinite if they are all equal, and not 0"""
    effect_low: float | None = None
    effect_high: float | None = None

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.differences)

    @property
    def direction(self) -> int:
        """1 or -1 if the 95 % interval excludes 0 (of three pairs or more), else 0."""
        if self.low is None or self.high is None or self.n < SEEDS_FOR_WORDS:
            return 0
        return int(self.low > 0) - int(self.high < 0)

    @property
    def smallest_p(self) -> float:
        """What the test could at best have reached."""
        return smallest_p(self.n)


def contrast(condition: Mapping[Hashable, float | None], baseline: Mapping[Hashable, float | None]) -> Contrast:
    """Compare two conditions over what both have a finite figure for, in the order of the first.

    >>> contrast({0: 2.0, 1: 3.0, 2: 4.0}, {1: 1.0, 2: 1.0, 3: 9.0}).differences
    (2.0, 3.0)
    """
    pairs = {pair: (value, baseline.get(pair)) for pair, value in condition.items()}
    return of({pair: a - b for pair, (a, b) in pairs.items() if is_known(a) and is_known(b)})


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether a figure was measured: a policy that diverged has some that are not finite."""
    return value is not None and math.isfinite(value)


def of(differences: Mapping[Hashable, float]) -> Contrast:
    """Return the statistics of paired differences.

    Raises:
        ValueError: one of them is NaN or infinite.
    """
    if not all(map(math.isfinite, differences.values())):
        raise ValueError(f"paired differences {dict(differences)} must be finite; leave out what was not measured")
    rounding = 1e-12 * max(map(abs, differences.values()), default=0.0)
    found = Contrast(tuple(differences), tuple(float(d) if abs(d) > rounding else 0.0 for d in differences.values()))
    if found.n == 0:
        return found
    found = replace(found, mean=fmean(found.differences))
    if found.n == 1:
        return found
    values = np.asarray(found.differences)
    means, effects = _resampled(values)
    low, high = interval(means)
    effect_low, effect_high = interval(effects)
    effect = float(_effects(values[None])[0])
    return replace(
        found, low=low, high=high, p=sign_flip(values), effect=effect, effect_low=effect_low, effect_high=effect_high
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the bootstrap interval of a mean, for pictures; None for fewer than two values."""
    return interval(_resampled(np.asarray(values, dtype=float))[0]) if len(values) > 1 else None


def smallest_p(n: int) -> float:
    """Return the least p that the test of n pairs can give.

    >>> smallest_p(3), smallest_p(9)
    (0.25, 0.00390625)
    """
    return min(1.0, 2.0 ** (1 - n))


def sign_flip(values: Sequence[float] | Floats) -> float:
    """Return the two-sided p of a mean of 0: how often random signs give a sum as far from 0 as this one.

    Exact up to 20 pairs; beyond, 10,000 draws of signs, with the one that was observed counted in.

    >>> sign_flip([1.0, 2.0, 3.0])
    0.25
    """
    given = np.asarray(values, dtype=float)
    exact = len(given) <= ENUMERABLE
    sums = _all_sums(given) if exact else _drawn_sums(given)
    rounding = 1e-12 * np.abs(given).sum()
    hits = int(np.count_nonzero(np.abs(sums) >= abs(given.sum()) - rounding))
    return hits / len(sums) if exact else (hits + 1) / (len(sums) + 1)


def holm(ps: Sequence[float]) -> list[float]:
    """Return p values that hold over the whole family (Holm's step-down, 1979), in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, floor = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        floor = max(floor, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = floor
    return adjusted


def corrected(family: Mapping[str, Contrast]) -> dict[str, Contrast]:
    """Fill in `Contrast.holm` over a family of contrasts; those without a p are none of it."""
    tested = {name: found.p for name, found in family.items() if found.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {name: replace(found, holm=adjusted.get(name)) for name, found in family.items()}


def interval(resampled: Floats) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile: values that were drawn, so that infinite ones do no harm."""
    low, high = np.percentile(resampled, (2.5, 97.5), method="inverted_cdf")
    return float(low), float(high)


def _resampled(values: Floats) -> tuple[Floats, Floats]:
    """Means and effect sizes of `DRAWS` resamples of the pairs."""
    drawn = values[np.random.default_rng(SEED).integers(len(values), size=(DRAWS, len(values)))]
    return drawn.mean(axis=1), _effects(drawn)


def _effects(samples: Floats) -> Floats:
    """Mean over standard deviation along the last axis; 0 where all is 0, infinite where all is the same."""
    means, spread = samples.mean(axis=1), samples.std(axis=1, ddof=1)
    same = np.ptp(samples, axis=1) <= 1e-12 * np.abs(samples).max(axis=1)  # rounding leaves a spread, but it is none
    endless = np.where(means == 0, 0.0, np.copysign(np.inf, means))
    return np.where(same, endless, means / np.where(same, 1.0, spread))


def _all_sums(values: Floats) -> Floats:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate((sums + value, sums - value))
    return sums


def _drawn_sums(values: Floats) -> Floats:
    signs = np.random.default_rng(SEED).integers(2, size=(DRAWS, len(values))) * 2 - 1
    return np.asarray(signs @ values, dtype=float)
