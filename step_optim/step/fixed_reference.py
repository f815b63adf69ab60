"""Plain functions that measure from a fixed policy, not from the weights before the step."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Hashable
from typing import Any

from step_optim.audit.closure import KLClosure
from step_optim.controllers.base import Point
from step_optim.limits import Limits
from step_optim.movement import Movement

ROUNDING = 1e-6
"""Part of a budget that theta_t may read for rounding."""

FLOAT32 = 1e-6
"""KL that equal policies may read in float32 [nats per token], about 1e-7 as a rule, as long as that is less than
`MATTERS` of the budget."""

MATTERS = 0.2
"""Less than a quarter: what a fixed reference reads before the second of two equal steps, of what it reads after it."""


class FixedReference:
    """Looks at what plain functions read at theta_t, where the movement is 0.

    One that measures from the start of training is the likeliest mistake: it
    reads 0 in the first step, and drift instead of movement in all others. So
    a function is looked at in the first step, in the first after one that
    moved the weights, and when many steps are rejected: these evaluations
    cost as much as an audit.
    """

    def __init__(self) -> None:
        self._looks: dict[Hashable, int] = {}
        """How often each function was looked at; those that make closures of one code count as one."""
        self._moved: set[Hashable] = set()
        """Functions after whose first look the weights have moved."""
        self._told: set[Hashable] = set()

    def is_due(self, kl: KLClosure) -> bool:
        """Whether this step should look at theta_t."""
        if not kl.opaque:
            return False
        key = _key(kl)
        return key not in self._told and (key not in self._looks or (self._looks[key] == 1 and key in self._moved))

    def forget(self, kl: KLClosure) -> None:
        """Look at a function that is bound anew from the beginning."""
        if kl.opaque:
            key = _key(kl)
            self._looks.pop(key, None)
            self._moved.discard(key)
            self._told.discard(key)

    def weights_moved(self) -> None:
        """A step has moved the weights."""
        self._moved.update(self._looks)

    def judge(self, kl: KLClosure, still: Movement | None, candidate: Point | None, limits: Limits) -> None:
        """Warn of a function that reads a movement at theta_t; once for each function.

        Args:
            kl: the KL closure.
            still: what it reads at theta_t; None if nobody has looked.
            candidate: None if that did not move.
            limits: the budgets in force.
        """
        if still is None or not kl.opaque:
            return
        finite = list(limits.as_set.values())
        if not finite and (candidate is None or not candidate.movement.is_finite):
            return  # nothing to compare with; the next step looks again
        scale = min(finite) if finite or candidate is None else candidate.movement.largest
        key = _key(kl)
        self._looks[key] = self._looks.get(key, 0) + 1
        # NaN is no sign of it, and an error of the candidate's audit besides.
        if key not in self._told and is_movement(still.largest, scale):
            self._told.add(key)
            warnings.warn(_told(kl, still.largest), stacklevel=2)


def is_movement(reading: float, scale: float) -> bool:
    """Whether a reading at theta_t [nats per token] is more than rounding, beside budgets of a scale."""
    return reading > max(ROUNDING * scale, min(FLOAT32, MATTERS * scale))


def _told(kl: KLClosure, reading: float) -> str:
    rounding = " (or it is rounding that is as large as the budget)" if reading <= FLOAT32 else ""
    return (
        f"{kl!r} reads {reading:.3g} at the weights before the step, and the movement of weights that have not moved "
        f"is 0: it seems to measure from a fixed reference (the start of training?){rounding}. Take its reference from "
        "the current weights before every step(), or use PolicyKL or TokenKL, which do that; to limit the drift from "
        "the start of training, give these a Budget(drift=...)"
    )


def _key(kl: Any) -> Any:
    """What a function is recognised by; a lambda that is made anew for every step is one function."""
    fn = kl.fn
    while isinstance(fn, functools.partial):
        fn = fn.func
    fn = inspect.unwrap(fn)
    return getattr(fn, "__code__", None) or type(fn)
