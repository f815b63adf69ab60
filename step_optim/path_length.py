"""The path length of a policy: the sum of the movements of its committed steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

NOTHING = 1e-6
"""Part of a cap below which what is left of it counts as nothing: searches for the largest feasible part of a step take
nearly all of what is left, and would go on for ever with steps too small to matter."""


@dataclass(frozen=True)
class PathLength:
    """How long a path is so far, in nats per token: of the run itself, and of the stages before it.

    >>> PathLength(0.25, {"safety": 0.125}, before=PathLength(0.25)).of("safety")
    0.125
    """

    mean: float = 0.0
    """Sum of K_global over the committed steps."""
    slices: Mapping[str, float] = field(default_factory=dict)
    """Sum of K_s, by slice."""
    before: PathLength | None = None
    """Of the stages before."""

    def of(self, slice_: str | None = None) -> float:
        """Return the whole length, of the mean or of a slice."""
        return self._with(0.0, slice_)

    def _with(self, kl: float, slice_: str | None) -> float:
        """The whole length after one more step, in the order in which it will be added up."""
        own = self.mean if slice_ is None else self.slices.get(slice_, 0.0)
        return (0.0 if self.before is None else self.before.of(slice_)) + (own + kl)

    def left(self, cap: float, slice_: str | None = None) -> float:
        """Return what a step may add so that the sum, as floats add up, does not exceed a cap.

        >>> PathLength(0.75).left(1.0), PathLength(1.5).left(1.0), PathLength(1.0).left(math.inf)
        (0.25, 0.0, inf)
        """
        if cap == math.inf:
            return cap
        left = cap - self.of(slice_)
        while left > 0 and self._with(left, slice_) > cap:  # rounded up
            left -= math.ulp(cap)
        return left if left > NOTHING * cap else 0.0

    def plus(self, other: PathLength) -> PathLength:
        """Return the path that goes on with another one.

        >>> PathLength(0.25, {"a": 0.5}).plus(PathLength(0.5, {"b": 0.25}))
        PathLength(mean=0.75, slices={'a': 0.5, 'b': 0.25}, before=None)
        """
        names = dict.fromkeys([*self.slices, *other.slices])
        slices = {name: self.of(name) + other.of(name) for name in names}
        return PathLength(self.of() + other.of(), slices)
