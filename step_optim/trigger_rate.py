"""From the movements of some steps to budgets that such steps would be over at a wanted rate."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context
from itertools import pairwise
from numbers import Real
from typing import Any

from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.precision import student_quantile

SLICE = "slice:"
"""Before the name of a slice, where it is the name of a constraint; see `Verdict.ratios`."""

LEAST = 3
"""Steps that any number of them is taken to be worth. At 2, Student's quantile is 6.3: where movement falls five times
in the first steps, budgets from 8 steps came out at 40 times the movement that followed, and at 3 at 8 times."""

BLOCKS = 5
"""Of neighbouring steps, that are left out in turn for an interval; with 8 it covered less (see `intervals_at`)."""

LARGEST = math.log(sys.float_info.max)
"""What the exponential function takes."""


def figures(movement: Movement, confidence: float | None = None) -> dict[str, float]:
    """Return what is held against a budget for the mean and for each slice, by constraint [nats per token].

    Args:
        movement: of one candidate.
        confidence: of `Budget`: the figures are upper bounds then.

    Raises:
        ValueError: a confidence, and no spread over prompts to tell a bound from.

    >>> figures(Movement(0.25, {"math": 0.5}))
    {'mean': 0.25, 'slice:math': 0.5}
    """
    against_1 = Limits(1.0, dict.fromkeys(movement.slices, 1.0), confidence=confidence)
    return dict(against_1.judge(movement).ratios)


def checked_rate(rate: Any) -> float:
    """Refuse a trigger rate that is none.

    Raises:
        TypeError: no number.
        ValueError: not between 0 and 1.
    """
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise TypeError(f"trigger_rate={rate!r} is no number; give 0.05 for 5 % of the steps, say")
    if not 0 < 1 - float(rate) < 1:
        raise ValueError(
            f"trigger_rate={rate!r} must be above 0 and below 1: the share of steps that may be over budget (0.05, "
            "say; Budget(mean=math.inf) only measures)"
        )
    return float(rate)


def budgets_at(steps: Sequence[Mapping[str, float]], rate: float, *, ahead: bool = True) -> dict[str, float]:
    """Return budgets that about this share of steps like these would be over, whichever constraint it is.

    Movements are about log-normal, and those of one step in all slices go up
    and down together. So all constraints j get one factor f on the geometric
    mean of their KL over n steps t, and f is the limit that a further step's
    largest excess stays below with probability 1 - rate:

        x_tj = log K_tj;  m_j = mean over t of x_tj;  d_t = max over j of (x_tj - m_j)
        f = exp(sqrt((e + 1) / (e - 1)) (mean of d + T s))
        budget_j = exp(m_j) f

    with s² the mean of (d - mean of d)², T Student's quantile at 1 - rate and
    e - 1 degrees of freedom. The root is exact for one constraint: its own
    mean takes a part 1/n off the variance of d, and adds it to that of a step
    to come. Steps that follow each other are alike, so n of them are worth
    fewer, those that an autoregression of d has (at least `LEAST`, at most n):

        e = n / (1 + 2 sum over k = 1..n-1 of (1 - k/n) r^k)

    with r the correlation of neighbours without its bias, r + (1 + 3r) / n (M.
    Kendall, Note on bias in the estimation of autocorrelation, Biometrika 41,
    1954, 403-404), not below 0.

    Rates that came out where 0.05 was asked, in simulations of 7 constraints
    (log-normal, spread 0.5 of which 70 % is common) over the 100 steps after
    n, whose first quarter was left out (tests/test_trigger_rate.py):

        n                                8     20     50    100
        independent steps             0.04   0.05   0.05   0.05
        neighbours correlated 0.5     0.08   0.05   0.05   0.05
        neighbours correlated 0.8     0.19   0.08   0.05   0.04
        rising 5 times in 5 steps     0.24   0.07   0.05   0.05
        falling 5 times in 5 steps    0.00   0.01   0.04   0.05
        rising 5 times in 20 steps    0.71   0.34   0.12   0.07

    Where spreads differ, the constraint with the widest one sets the factor,
    and the others are seldom met (0.08 for spreads from 0.2 to 1.2).

    Args:
        steps: KL by constraint [nats per token], at least 2 steps in the order in which they were made. In each,
            some constraint that all of them have is above 0.
        rate: between 0 and 1; of steps, not of steps and constraints.
        ahead: whether the budgets are for the steps that follow these, and not for another run that goes the same way
            from its first step on. For that it does not matter how alike neighbours are, nor how movements are
            spread: log f is the rate (n + 1)-th largest d, between two of them on a line, which a further d is above
            with probability `rate` if all orders of d are alike. Where that place is before the largest, log f is as
            above with e = n, and not below the largest.

    Returns:
        By constraint. One that never moved gets the largest of the others'.

    >>> steps = [{"mean": kl, "slice:math": 2 * kl} for kl in (0.01, 0.02, 0.01, 0.02, 0.01, 0.02)]
    >>> {name: round(budget, 3) for name, budget in budgets_at(steps, 0.05).items()}
    {'mean': 0.032, 'slice:math': 0.065}
    """
    return {name: math.exp(min(value, LARGEST)) for name, value in _logs_at(steps, rate, ahead).items()}


def intervals_at(steps: Sequence[Mapping[str, float]], rate: float) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals for the budgets that exactly this share of all steps like these would be over.

    They lie around the budgets for another run (`budgets_at`, ``ahead=False``),
    and are the wider of two block jackknifes: of these, and of the budgets for
    the steps ahead, which vary more where neighbours are alike. g = `BLOCKS`
    blocks of neighbouring steps are left out in turn; with b_i the logarithm
    of the budget without block i, and t Student's quantile at 0.975 and g - 1
    degrees of freedom:

        exp(log budget -+ t sqrt((g - 1) / g sum over i of (b_i - mean of b)²))

    How often they covered the true budget of 0.05, in the simulations of
    `budgets_at`:

        n                                          20     50    100    300
        independent steps                        0.94   0.95   0.97   0.97
        neighbours correlated 0.5                0.98   0.96   0.98   0.96
        neighbours correlated 0.8                0.95   0.95   0.97   0.96
        the same, only the budgets' own          0.73   0.84   0.88   0.92
        the same, percentiles of a bootstrap     0.39   0.55   0.69
          of blocks

    Returns:
        By constraint; (0, inf) where blocks would have fewer than two steps.
    """
    centre = _logs_at(steps, rate, ahead=False)
    if len(steps) < 2 * BLOCKS:
        return dict.fromkeys(centre, (0.0, math.inf))
    ends = pairwise(len(steps) * i // BLOCKS for i in range(BLOCKS + 1))
    parts = [[*steps[:start], *steps[end:]] for start, end in ends]
    ways = [[_logs_at(part, rate, ahead) for part in parts] for ahead in (True, False)]
    return {
        name: _around(value, max(_error([part[name] for part in way]) for way in ways))
        for name, value in centre.items()
    }


def rounded_up(value: float, digits: int) -> float:
    """Return a number of few digits, none below the value.

    Budgets are rounded up so that they can be read, are equal in processes
    with different math libraries, and let through steps that are all alike.

    >>> rounded_up(0.0312345, 3), rounded_up(0.03, 3)
    (0.0313, 0.03)
    """
    return float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(value)))


def _logs_at(steps: Sequence[Mapping[str, float]], rate: float, ahead: bool) -> dict[str, float]:
    """Logarithms of `budgets_at`."""
    names = [name for name in steps[0] if all(name in step for step in steps)]
    logs = {name: [_log(step[name]) for step in steps] for name in names}
    levels = {name: _mean(moved) for name, each in logs.items() if (moved := [x for x in each if x > -math.inf])}
    excess = [max(logs[name][t] - level for name, level in levels.items()) for t in range(len(steps))]
    factor = _limit(excess, rate, ahead)
    largest = max(levels.values())
    return {name: levels.get(name, largest) + factor for name in names}


def _limit(excess: Sequence[float], rate: float, ahead: bool) -> float:
    """What a further one of these is above with this probability; see `budgets_at`."""
    count = len(excess)
    if not ahead and rate * (count + 1) >= 1:
        return _largest(excess, min(rate * (count + 1), count))
    centre = _mean(excess)
    off = [value - centre for value in excess]
    worth = _worth(off) if ahead else count
    student = student_quantile(max(rate, 1 - rate), worth - 1)
    spread = math.sqrt(_mean([x * x for x in off]))
    limit = math.sqrt((worth + 1) / (worth - 1)) * (centre + math.copysign(student, 0.5 - rate) * spread)
    return limit if ahead else max(limit, *excess)


def _largest(values: Sequence[float], place: float) -> float:
    """The largest value but ``place - 1``, between two of them on a line."""
    ordered, whole = sorted(values, reverse=True), math.floor(place)
    after = ordered[min(whole, len(ordered) - 1)]
    return ordered[whole - 1] + (place - whole) * (after - ordered[whole - 1])


def _worth(off: Sequence[float]) -> int:
    """How many independent steps say as much about a mean as these, given as deviations from theirs."""
    count, squares = len(off), math.fsum(x * x for x in off)
    correlation = math.fsum(a * b for a, b in pairwise(off)) / squares if squares > 0 else 0.0
    correlation = min(max(correlation + (1 + 3 * correlation) / count, 0.0), 1.0)
    alike = math.fsum((1 - k / count) * correlation**k for k in range(1, count))
    return min(count, max(LEAST, int(count / (1 + 2 * alike))))


def _error(without: Sequence[float]) -> float:
    """Jackknife standard error, from estimates without each block."""
    count, centre = len(without), _mean(without)
    return math.sqrt((count - 1) / count * math.fsum((x - centre) ** 2 for x in without))


def _around(value: float, error: float) -> tuple[float, float]:
    half = student_quantile(0.975, BLOCKS - 1) * error
    return math.exp(min(value - half, LARGEST)), math.exp(min(value + half, LARGEST))


def _log(kl: float) -> float:
    return math.log(kl) if kl > 0 else -math.inf


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
