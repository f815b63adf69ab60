"""The alphas that a search has evaluated, and the interval that the largest feasible one lies in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Ratios(Protocol):
    """A point as a search sees it."""

    @property
    def feasible(self) -> bool:
        """Whether every KL / budget is at most 1."""

    @property
    def ratios(self) -> Mapping[str, float]:
        """KL / budget by constraint."""


@dataclass(frozen=True)
class Found:
    """One evaluated alpha and the square roots of its KL / budget ratios, by constraint."""

    alpha: float
    roots: Mapping[str, float]
    feasible: bool

    @property
    def largest(self) -> float:
        """max_j sqrt(K_j / eps_j)."""
        return max(self.roots.values(), default=math.nan)


class Bracket:
    """The evaluated points, and the interval that the largest feasible alpha lies in."""

    def __init__(self, at_one: Found, slopes: Mapping[str, float], at_zero: Mapping[str, float] | None = None) -> None:
        self.found, self.slopes = [at_one], slopes
        self.starts = {name: math.sqrt(ratio) for name, ratio in (at_zero or {}).items() if ratio > 0}
        """sqrt(K / eps) at alpha = 0 of the constraints that do not begin at 0: caps on the drift."""
        self.low, self.high = 0.0, 1.0
        self.asked = (0.0, 1.0)
        """The alphas that were asked for to get there: other ones where rounding leaves another part of a step."""
        self.halved = False

    def add(self, found: Found, asked: float) -> None:
        """Narrow the interval by a point that was audited."""
        self.found.append(found)
        self.narrow(found.alpha, found.feasible)
        low, high = self.asked
        self.asked = (max(low, asked), high) if found.feasible else (low, min(high, asked))

    def narrow(self, alpha: float, feasible: bool) -> None:
        """Narrow the interval by what is known of an alpha."""
        width = self.high - self.low
        if feasible:
            self.low = max(self.low, alpha)
        else:
            self.high = min(self.high, alpha)
        self.halved = self.high - self.low <= 0.5 * width

    def closed(self, tol: float) -> bool:
        """Whether the best feasible alpha is within ``tol`` of any alpha that could still be feasible."""
        return self.low > 0 and self.low >= (1 - tol) * self.high

    @property
    def middle(self) -> float:
        """Where bisection goes."""
        return 0.5 * (self.low + self.high)
