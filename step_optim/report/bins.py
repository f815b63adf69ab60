"""A run in few enough pieces to be drawn: consecutive steps together, with their range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 240
"""Pieces of a run at most: about as many as a chart has room for."""


@dataclass(frozen=True)
class Bins:
    """Groups of consecutive steps; of a short run each step is one.

    >>> bins = Bins.of(7, at_most=3)
    >>> bins.width, bins.first.tolist()
    (3, [0, 3, 6])
    >>> bins.highest(torch.arange(7.0)).tolist()
    [2.0, 5.0, 6.0]
    """

    count: int
    """Steps, T."""
    width: int
    """Steps in a group; the last may have fewer."""

    @classmethod
    def of(cls, count: int, at_most: int = BINS) -> Bins:
        """Divide so many steps into at most so many groups of one width."""
        return cls(count, max(1, -(-count // at_most)))

    @property
    def first(self) -> Tensor:
        """[B] positions of the first step of each group."""
        return torch.arange(0, self.count, self.width, device="cpu")

    @property
    def last(self) -> Tensor:
        """[B] positions of the last."""
        return (self.first + self.width - 1).clamp_max(self.count - 1)

    def _grouped(self, column: Tensor) -> Tensor:
        """[T, ...] as [B, width, ...], filled up with NaN; what is not finite is NaN, too."""
        short = len(self.first) * self.width - self.count
        filling = torch.full((short, *column.shape[1:]), math.nan, dtype=column.dtype, device="cpu")
        filled = torch.cat([column, filling])
        grouped = filled.view(len(self.first), self.width, *column.shape[1:])
        return torch.where(grouped.isfinite(), grouped, math.nan)

    def lowest(self, column: Tensor) -> Tensor:
        """The smallest finite figure of each group, [T, ...] -> [B, ...]; NaN if it has none."""
        return -self.highest(-column)

    def highest(self, column: Tensor) -> Tensor:
        """The largest finite figure of each group, [T, ...] -> [B, ...]; NaN if it has none."""
        found = self._grouped(column).nan_to_num(-math.inf).amax(1)
        return torch.where(found.isfinite(), found, math.nan)

    def where_highest(self, column: Tensor) -> Tensor:
        """[B] positions of the largest finite figure of each group, [T]; the first step of it, if it has none."""
        return self.first + self._grouped(column).nan_to_num(-math.inf).argmax(1)

    def mean(self, column: Tensor) -> Tensor:
        """The mean of the finite figures of each group, [T, ...] -> [B, ...]; NaN if it has none."""
        return self._grouped(column).nanmean(1)

    def final(self, column: Tensor) -> Tensor:
        """The last figure of each group, [T, ...] -> [B, ...]."""
        return column[self.last]

    def members(self, flags: Sequence[bool]) -> list[list[int]]:
        """Positions of the steps that are flagged, of each group."""
        return [
            [i for i in range(int(first), int(last) + 1) if flags[i]]
            for first, last in zip(self.first, self.last, strict=True)
        ]
