"""The way from theta_t to the candidate: the straight line, or one on which some tensors arrive before others."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Path:
    """Which part of its step each tensor has made at alpha: min(1, s w_i), with s such that alpha of the step is made.

    alpha is the share of the whole step: sum_i part_i q_i / sum_i q_i, with q_i
    the square of the length of tensor i's step. On the straight line all
    weights w_i are the same, and every part is alpha.

    Args:
        weights: w_i > 0, how early a tensor arrives.
        squares: q_i >= 0; by default the parts themselves are averaged.

    >>> Path([1.0, 3.0], [1.0, 1.0]).parts(0.5), Path([1.0, 3.0], [1.0, 1.0]).parts(0.75)
    ([0.25, 0.75], [0.5, 1.0])
    """

    def __init__(self, weights: Sequence[float], squares: Sequence[float]) -> None:
        if len(weights) != len(squares):
            raise ValueError(f"{len(weights)} weights for {len(squares)} tensors; give one for each")
        if not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"the weights {list(weights)} must be numbers above 0")
        self._weights, total = list(weights), sum(squares)
        self._shares = [square / total if total > 0 else 1 / len(squares) for square in squares]

    @property
    def weights(self) -> list[float]:
        """How early each tensor arrives."""
        return list(self._weights)

    def parts(self, alpha: float) -> list[float]:
        """Return the part of each tensor, 0 to 1; exactly 0 and exactly 1 at the ends."""
        if alpha in (0, 1):
            return [float(alpha)] * len(self._weights)
        scale = self._scale(alpha)
        return [min(1.0, scale * weight) for weight in self._weights]

    def _scale(self, alpha: float) -> float:
        """The s at which alpha of the step is made.

        The tensors of most weight arrive first: of the others, which make
        s w_i each, alpha less what has arrived is wanted.
        """
        first = sorted(zip(self._weights, self._shares, strict=True), reverse=True)
        scale, arrived = 0.0, 0.0
        for i, (weight, share) in enumerate(first):
            rate = math.fsum(w * q for w, q in first[i:])
            if rate > 0:
                scale = (alpha - arrived) / rate
            if rate <= 0 or scale * weight <= 1:
                break
            arrived += share
        return scale
