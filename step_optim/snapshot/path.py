"""The way from theta_t to the candidate: the straight line, or one on which some tensors arrive before others."""

from __future__ import annotations

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
        self._weights = list(weights)
        if len(weights) != len(squares) or not all(weight > 0 for weight in weights):
            raise ValueError(f"{len(squares)} weights above 0 are needed, one for each tensor, not {len(weights)}")
        total = sum(squares)
        self._shares = [square / total for square in squares] if total > 0 else [1 / len(squares)] * len(squares)

    def parts(self, alpha: float) -> list[float]:
        """Return the part of each tensor, 0 to 1; exactly 0 and exactly 1 at the ends."""
        if alpha in (0, 1):
            return [float(alpha)] * len(self._weights)
        rest, open_ = alpha, sum(w * q for w, q in zip(self._weights, self._shares, strict=True))
        scale = 0.0
        for weight, share in sorted(zip(self._weights, self._shares, strict=True), reverse=True):  # who arrives first
            if open_ <= 0:
                break
            scale = rest / open_
            if scale * weight <= 1:
                break
            rest, open_ = rest - share, open_ - weight * share
        return [min(1.0, scale * weight) for weight in self._weights]
