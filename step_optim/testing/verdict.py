"""What `check_optimizer` found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

STICKS = 0.8
"""Share of a movement taken back that has to stay away. Weight decay costs a few percent; slow weights cost half."""


class Kind(str, Enum):
    """All that a verdict comes to."""

    EXACT = "exact"
    """Every controller can be used."""
    NEEDS_PARAM_LIKE = "exact, but shrink needs param_like"
    """Tell `STEPOptimizer` where the copies of the weights are; rejecting is exact without that."""
    REFUSES_SHRINK = "exact; refuses shrink"
    """`STEPOptimizer` knows that interpolation does not last, and raises: use `Gate`."""
    DO_NOT_SHRINK = "exact, but do not shrink by interpolation"
    """The same, of an optimizer that `STEPOptimizer` does not know: it will not stop you."""
    REFUSE = "refuse"
    """Do not wrap it."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Finding:
    """One check: true if it passed."""

    why: str = ""
    """What is wrong; empty if nothing is."""

    def __bool__(self) -> bool:
        return not self.why


NOT_TRIED = Finding("not tried")


@dataclass(frozen=True)
class Verdict:
    """What an optimizer does under `STEPOptimizer`.

    Its findings are true where all is well, and say ``.why`` where it is not;
    what was not tried, because something before it failed, is not well.
    ``str()`` of a verdict is a readable report.
    """

    optimizer: str
    """Class of the optimizer."""

    dtype: torch.dtype
    """Of the weights in the test."""

    runs: Finding = NOT_TRIED
    """The optimizer trains on its own; nothing else is tried if it does not."""

    accepted: Finding = NOT_TRIED
    """`STEPOptimizer` takes it; nothing else is tried if it does not."""

    rollback: Finding = NOT_TRIED
    """All is as if the rejected steps had never been; nothing else is tried if it is not."""

    transparent: Finding = NOT_TRIED
    """An infinite budget leaves all as in the bare run."""

    resumes: Finding = NOT_TRIED
    """Saved and loaded, it continues as the bare optimizer does that is saved and loaded."""

    resumes_bare: Finding = NOT_TRIED
    """The bare optimizer continues as if it had not been saved. If it does not, that is not the wrapper's fault."""

    interpolates: Finding = NOT_TRIED
    """Half a step lies on the line, and stays half a step."""

    sticks: float = math.nan
    """Share of a movement that stays away if only the weights are put back: below `STICKS`, state brings it back."""

    half_sticks: float = math.nan
    """As ``sticks``, for half a step committed by `STEPOptimizer`, which moves what is in ``param_like`` along."""

    param_like: tuple[str, ...] = ()
    """State keys that `STEPOptimizer` knows, or was told, to hold copies of the weights."""

    needs: tuple[str, ...] = ()
    """State keys which it was not told, and which make half a step last: pass them as ``param_like``."""

    refuses_shrink: bool = False
    """Whether `STEPOptimizer` knows that interpolation does not last, and raises."""

    @property
    def exact(self) -> bool:
        """Whether rejected steps leave no trace, and committed ones are those of the bare optimizer."""
        return all((self.runs, self.accepted, self.rollback, self.transparent, self.resumes))

    @property
    def verdict(self) -> Kind:
        """What it comes to."""
        if not self.exact:
            return Kind.REFUSE
        if self.needs:
            return Kind.NEEDS_PARAM_LIKE
        if self.refuses_shrink:
            return Kind.REFUSES_SHRINK
        return Kind.EXACT if self.interpolates else Kind.DO_NOT_SHRINK

    @property
    def why(self) -> str:
        """The reason for a verdict that is not `Kind.EXACT`; else which state moves along, if any does."""
        if not self.runs:
            return f"it does not run on its own: {self.runs.why}"
        checks = (self.accepted, self.rollback, self.transparent, self.resumes)
        wrong = next((finding.why for finding in checks if not finding), "")
        if wrong or self.needs:
            return wrong or repr(self.needs)
        return self.interpolates.why or (f"shrink moves {', '.join(self.param_like)} along" if self.param_like else "")

    @property
    def headline(self) -> str:
        """The verdict and the reason for it, in one line."""
        sign = "=" if self.verdict is Kind.NEEDS_PARAM_LIKE else "; " if self.verdict is Kind.EXACT else ": "
        return f"{self.verdict}{sign}{self.why}" if self.why else str(self.verdict)

    def __str__(self) -> str:
        lines = [f"{self.optimizer}, {str(self.dtype).removeprefix('torch.')}: {self.headline}"]
        if self.rollback:
            resumes = self.resumes.why or self.resumes_bare.why or "continues as the bare optimizer does"
            lines += [
                "  rollback    bit for bit",
                f"  commits     {self.transparent.why or 'as without the wrapper, bit for bit'}",
                f"  state_dict  {resumes}",
                f"  shrink      {self.interpolates.why or f'{self.half_sticks:.2f} of what was taken back stays away'}",
            ]
        return "\n".join(lines)
