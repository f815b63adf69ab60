"""What `check_optimizer` found."""

from __future__ import annotations

from dataclasses import dataclass

import torch

STICKS = 0.8
"""Share of a movement taken back that has to stay away. Weight decay costs a few percent; slow weights cost half."""


@dataclass(frozen=True)
class Verdict:
    """What an optimizer does under `STEPOptimizer`; ``str()`` of it is a readable report.

    Every text is empty where there is nothing to complain about.
    """

    optimizer: str
    """Class of the optimizer."""

    dtype: torch.dtype
    """Of the weights in the test."""

    bare: str = ""
    """Why the optimizer does not run on its own; then nothing else was tried."""

    refused: str = ""
    """Why `STEPOptimizer` does not take it; then nothing else was tried."""

    rollback: str = ""
    """What is not as if the rejected steps had never been: the first difference found. Then nothing else was tried."""

    commits: str = ""
    """What an infinite budget does not leave as in the bare run."""

    round_trip: str = ""
    """What differs from the bare optimizer after saving and loading both."""

    bare_round_trip: str = ""
    """Why the bare optimizer does not survive saving and loading; then neither does the wrapped one."""

    sticks: float = 1.0
    """Share of a movement that stays away if only the weights are put back: below `STICKS`, state brings it back."""

    shrink: str = ""
    """Why ``shrink="interpolate"`` does not work; then only `Gate`, or ``shrink="restep"``, can be used."""

    refuses_shrink: bool = False
    """Whether `STEPOptimizer` knows that, and refuses to interpolate."""

    shrink_sticks: float = 1.0
    """As ``sticks``, for half a step committed by `STEPOptimizer`, which moves what is in ``param_like`` along."""

    param_like: tuple[str, ...] = ()
    """State keys that `STEPOptimizer` knows, or was told, to hold copies of the weights."""

    needs: tuple[str, ...] = ()
    """State keys which it was not told, and which make half a step last: pass them as ``param_like``."""

    restep: str = ""
    """Why ``shrink="restep"`` does not work."""

    @property
    def exact(self) -> bool:
        """Whether rejected steps leave no trace, and committed ones are those of the bare optimizer."""
        return not (self.bare or self.refused or self.rollback or self.commits or self.round_trip)

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        if self.bare:
            return f"does not run: {self.bare}"
        if self.refused:
            return f"refused: {self.refused}"
        if not self.exact:
            return f"refuse: {self.rollback or self.commits or self.round_trip}"
        if self.needs:
            return f"exact, but shrink needs param_like={self.needs}"
        if self.refuses_shrink:
            return f"exact; refuses to shrink by interpolation: {self.shrink}"
        if self.shrink:
            return f"exact, but do not shrink by interpolation: {self.shrink}"
        return f"exact; shrink moves state {self.param_like} along" if self.param_like else "exact"

    def __str__(self) -> str:
        lines = [f"{self.optimizer}, {str(self.dtype).removeprefix('torch.')}: {self.headline}"]
        if not (self.bare or self.refused or self.rollback):
            lines += [
                "  rollback    bit for bit",
                f"  commits     {self.commits or 'as without the wrapper, bit for bit'}",
                f"  state_dict  {self.round_trip or self.bare_round_trip or 'continues as the bare optimizer does'}",
                f"  shrink      {self.shrink or f'{self.shrink_sticks:.2f} of what was taken back stays away'}",
                f"  restep      {self.restep or 'works'}",
            ]
        return "\n".join(lines)
