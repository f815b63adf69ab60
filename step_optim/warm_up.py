"""The warm-up of an automatic budget: it counts the first steps, and fixes budgets from them."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.trigger_rate import SLICE, budgets_at, checked_rate, figures, rounded_up

LOGGER = logging.getLogger("step_optim")

BEGINNING = 4
"""A quarter of the steps is left out, the first ones: Adam's moments are young there, momentum is not up to speed, and
movement often differs by several times."""

DIGITS = 6
"""Of the budgets that are fixed."""


@dataclass(frozen=True)
class WarmUp:
    """What an automatic budget has seen, or what it was fixed at. It is immutable: `plus` returns the next one.

    Raises:
        TypeError: a number of steps or a rate that is no number.
        ValueError: fewer than 2 steps; a rate that is not between 0 and 1.

    >>> warm_up = WarmUp(2, 0.05)
    >>> warm_up.plus(Movement(0.25)).plus(Movement(0.25)).within(Limits()).mean
    0.25
    """

    steps: int
    """How many are measured."""
    trigger_rate: float
    """Of steps like these, the share that would be over budget, about."""
    confidence: float | None = None
    """Of `Budget`: upper confidence bounds are measured then."""
    counted: tuple[Mapping[str, float], ...] = ()
    """KL by constraint of each step so far; empty once the budgets are fixed."""
    fixed: Mapping[str, float] = field(default_factory=dict)
    """The budgets by constraint, "mean" and "slice:<name>"; empty during the warm-up."""

    def __post_init__(self) -> None:
        """Refuse a warm-up that cannot end, or says nothing."""
        steps: Any = self.steps
        if isinstance(steps, bool) or not isinstance(steps, Integral):
            raise TypeError(f"warmup={self.steps!r} is no number of steps; give 20, say")
        if self.steps < 2:
            raise ValueError(f"warmup={self.steps} must be at least 2: one step shows no spread. 20 is a good start")
        object.__setattr__(self, "steps", int(steps))  # checkpoints hold plain numbers
        object.__setattr__(self, "trigger_rate", checked_rate(self.trigger_rate))

    def plus(self, movement: Movement) -> WarmUp:
        """Count a step; with the last one the budgets are fixed, and later steps change nothing.

        Args:
            movement: of its candidate; finite, and its mean is above 0.
        """
        if self.fixed:
            return self
        counted = (*self.counted, figures(movement, self.confidence))
        if len(counted) < self.steps:
            return replace(self, counted=counted)
        found = budgets_at(counted[len(counted) // BEGINNING :], self.trigger_rate)
        fixed = {name: min(rounded_up(kl, DIGITS), sys.float_info.max) for name, kl in found.items()}
        return replace(self, counted=(), fixed=fixed)

    def within(self, limits: Limits) -> Limits:
        """Return limits that are lowered to the fixed budgets; during the warm-up they stay."""
        if not self.fixed:
            return limits
        own = {name.removeprefix(SLICE): kl for name, kl in self.fixed.items() if name != "mean"}
        slices = {name: min(kl, limits.slices.get(name, math.inf)) for name, kl in own.items()}
        return replace(limits, mean=min(limits.mean, self.fixed["mean"]), slices=slices)

    def check_slices(self, names: Iterable[str]) -> None:
        """Refuse a KL closure with other slices than those of the first steps.

        Raises:
            ValueError: it has others.
        """
        known = self.fixed or (self.counted[0] if self.counted else None)
        if known is None:
            return
        own, other = sorted(name.removeprefix(SLICE) for name in known if name != "mean"), sorted(names)
        if other != own:
            raise ValueError(
                f"{self} is of the slices {own}, which its first steps measured, and the KL closure has {other}; "
                "begin anew with set_budget(Budget.auto(...))"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: what was asked, and what was seen so far."""
        return {**self._asked, "counted": [dict(step) for step in self.counted], "fixed": dict(self.fixed)}

    @property
    def _asked(self) -> dict[str, Any]:
        return {"steps": self.steps, "trigger_rate": self.trigger_rate, "confidence": self.confidence}

    def loaded(self, state: Mapping[str, Any]) -> WarmUp:
        """Return the warm-up that goes on from a checkpoint, or begins if that has another one, or none.

        Args:
            state: of `state_dict`; empty if the checkpoint is of a run with an ordinary budget.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: it is damaged.
        """
        new = replace(self, counted=(), fixed={})
        if not state:
            if self.counted or self.fixed:
                LOGGER.warning("%s begins anew: the checkpoint is of a run with another budget", new)
            return new
        asked = {name: state[name] for name in self._asked}
        if asked != self._asked:
            LOGGER.warning("%s begins anew: the checkpoint has one of %s", new, asked)
            return new
        counted = tuple(map(_read, state["counted"]))
        if len(counted) >= self.steps:
            raise ValueError(f"a warm-up of {self.steps} steps has counted {len(counted)}")
        return replace(new, counted=counted, fixed=_read(state["fixed"]) if state["fixed"] else {})

    def __str__(self) -> str:
        asked = f"Budget.auto(warmup={self.steps}, trigger_rate={self.trigger_rate})"
        if not self.fixed:
            return f"{asked} after {len(self.counted)} steps" if self.counted else asked
        return f"{asked} fixed at {', '.join(f'{name} {kl:.3g}' for name, kl in self.fixed.items())}"


def _read(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures of a checkpoint: KLs, and that of the mean above 0."""
    read = {str(name): float(kl) for name, kl in figures.items()}
    if not all(0 <= kl < math.inf for kl in read.values()) or read["mean"] == 0:
        raise ValueError(f"{read} are no movements of a step")
    return read
