"""Figures and differences in words and in markdown. A difference is only called one if its interval excludes 0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from study.reporting.paired import SEEDS_FOR_P, SEEDS_FOR_WORDS, Contrast

NOTHING = "n/a"
"""In the place of a figure that is not defined."""


def number(value: float | None, digits: int = 3) -> str:
    """Write a figure with a few significant digits, never as NaN.

    >>> number(0.0123456), number(None), number(-1234.5), number(float("inf")), number(0.0)
    ('0.0123', 'n/a', '-1234', 'unbounded', '0')
    """
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "unbounded" if value > 0 else "-unbounded"
    if abs(value) >= 10**digits:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """Write a rate.

    >>> percent(0.25), percent(None)
    ('25 %', 'n/a')
    """
    return NOTHING if value is None else f"{100 * value:.0f} %"


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds; the mean alone of one seed.

    >>> spread([1.0, 2.0, 3.0]), spread([1.0, None]), spread([])
    ('2 ± 1', '1', 'n/a')
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return NOTHING
    if len(known) == 1:
        return number(known[0], digits)
    return f"{number(fmean(known), digits)} ± {number(stdev(known), 2)}"


def bracket(low: float | None, high: float | None) -> str:
    """An interval; nothing where there is none.

    >>> bracket(-0.1, 0.25)
    '[-0.1, 0.25]'
    """
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def difference(found: Contrast) -> str:
    """A difference and its interval, in bold if that excludes 0."""
    if found.mean is None:
        return NOTHING
    text = f"{number(found.mean)} {bracket(found.low, found.high)}".strip()
    return f"**{text}**" if found.direction else text


def verdict(found: Contrast, pairs: str = "seed") -> str:
    """Say what a contrast shows: a verb, and what follows it.

    >>> from study.reporting.paired import of
    >>> verdict(of({seed: 0.1 + seed / 100 for seed in range(9)}))
    'is higher by 0.14 (interval [0.123, 0.157], 9 seeds, p = 0.00391)'
    >>> verdict(of({0: 0.1, 1: 0.2, 2: 0.3}))
    'is higher by 0.2 (interval [0.1, 0.3], on 3 of 3 seeds)'
    >>> verdict(of({0: -1.0, 1: 1.0, 2: 0.5}))
    'shows no difference that this study can see (interval [-1, 1], 3 seeds)'
    """
    if found.mean is None:
        return f"was not compared: no {pairs} has both"
    if found.n < SEEDS_FOR_WORDS:
        return f"cannot be judged on {counted(found.n, pairs)} (difference {number(found.mean)})"
    where, many = f"interval {bracket(found.low, found.high)}", counted(found.n, pairs)
    if not found.direction:
        return f"shows no difference that this study can see ({where}, {many})"
    word = "higher" if found.direction > 0 else "lower"
    if found.n < SEEDS_FOR_P:  # no p below .05 is possible
        agree = sum(difference * found.direction > 0 for difference in found.differences)
        tested = f"on {agree} of {many}"
    else:
        tested = f"{many}, p = {number(found.p)}"
    return f"is {word} by {number(abs(found.mean))} ({where}, {tested})"


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(items: Sequence[str]) -> str:
    """Join as in a sentence.

    >>> listed(["a", "b", "c"]), listed([])
    ('a, b and c', 'none')
    """
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:]))) or "none"


def sentence(text: str) -> str:
    """Begin with a capital, and end with a full stop."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", ":")) else ".")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table: text on the left in the first column, figures on the right in the others."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def folded(title: str, text: str) -> str:
    """What a reader may open."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def bullets(items: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {item}" for item in items)
