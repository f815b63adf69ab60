"""Budgets: how far one step may move the policy, and whether a movement is within them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TypeAlias

from step_optim.movement import Movement

Bound: TypeAlias = "float | Callable[[int], float]"
"""A number of nats per token, or a schedule: step index -> number."""


@dataclass(frozen=True)
class Verdict:
    """Whether a movement is within its limits, and which limit is nearest or most exceeded."""

    ratios: Mapping[str, float]
    """KL / budget by constraint: ``"mean"``, ``"slice:<name>"``, ``"reference"``. Infinite budgets are left out."""

    finite: bool = True
    """False if a measured figure, or the update itself, is NaN or infinite: never feasible."""

    @property
    def feasible(self) -> bool:
        """K_global <= eps_g, K_s <= eps_s for every slice, drift <= its cap, all of them finite."""
        return self.finite and all(ratio <= 1 for ratio in self.ratios.values())

    @property
    def binding(self) -> str | None:
        """The constraint with the largest KL / budget; None if no budget is finite."""
        if not self.ratios:
            return None
        return max(self.ratios, key=lambda name: math.inf if math.isnan(self.ratios[name]) else self.ratios[name])


@dataclass(frozen=True)
class Limits:
    """The budgets in force at one step: plain numbers in nats per token, inf where unlimited."""

    mean: float = math.inf
    """eps_g, for K_global."""

    slices: Mapping[str, float] = field(default_factory=dict)
    """eps_s for each slice."""

    reference: float = math.inf
    """Cap on the global drift from pi_ref."""

    def judge(self, movement: Movement, drift: Movement | None = None) -> Verdict:
        """Compare a movement (and the drift from pi_ref) with these limits.

        The paper's trust region (section 3.2): K_global <= eps_g and max_s K_s <= eps_s.

        >>> Limits(mean=0.03).judge(Movement(0.06)).ratios
        {'mean': 2.0}

        Raises:
            ValueError: a limited slice, or the drift, was not measured.
        """
        measured = [("mean", movement.mean, self.mean)]
        for name, limit in self.slices.items():
            if name not in movement.slices:
                raise ValueError(
                    f"budget.slices limits {name!r}, but the KL closure measured {sorted(movement.slices)}"
                )
            measured.append((f"slice:{name}", movement.slices[name], limit))
        if self.reference < math.inf:
            if drift is None:
                raise ValueError("budget.reference needs a KL closure that measures drift (TokenKL, PolicyKL)")
            measured.append(("reference", drift.mean, self.reference))
        ratios = {name: _ratio(kl, limit) for name, kl, limit in measured if limit < math.inf}
        return Verdict(ratios, finite=movement.is_finite and (drift is None or drift.is_finite))


@dataclass(frozen=True)
class Budget:
    """Movement allowed per step, in nats per token.

    Args:
        mean: eps_g, for the mean over all control prompts.
        slices: eps_s: one number for every slice, or a mapping slice -> number
            (slices that it does not name are unlimited).
        reference: cap on the mean drift from pi_ref, the policy at the start
            of training.

    Each number may be a callable of the step index (a schedule), and
    ``math.inf`` turns a part off: ``Budget(mean=math.inf)`` only measures.

    Raises:
        ValueError: NaN, negative, or nothing limited at all.
        TypeError: not a number and not callable.

    >>> Budget(mean=0.03, slices={"safety": 0.01}).at(0, ["math", "safety"]).slices
    {'safety': 0.01}
    """

    mean: Bound | None = None
    slices: Bound | Mapping[str, Bound] | None = None
    reference: Bound | None = None

    def __post_init__(self) -> None:
        """Refuse bad numbers now, before any weight moves."""
        if self.mean is None and self.slices is None and self.reference is None:
            raise ValueError(
                "Budget() limits nothing; pass mean=, slices= or reference= in nats per token "
                "(mean=math.inf to only measure)"
            )
        named = {"mean": self.mean, "reference": self.reference}
        if isinstance(self.slices, Mapping):
            if not self.slices:
                raise ValueError("budget.slices={} limits no slice; leave it out or name a slice")
            named |= {f"slices[{name!r}]": bound for name, bound in self.slices.items()}
        else:
            named["slices"] = self.slices
        for name, bound in named.items():
            if bound is not None and not callable(bound):
                _checked(bound, name)

    @classmethod
    def of(cls, value: Budget | Bound) -> Budget:
        """Read ``budget=0.03`` as ``Budget(mean=0.03)``."""
        return value if isinstance(value, Budget) else cls(mean=value)

    @property
    def _bounds(self) -> list[Bound | None]:
        slices = list(self.slices.values()) if isinstance(self.slices, Mapping) else [self.slices]
        return [self.mean, self.reference, *slices]

    @property
    def limits_anything(self) -> bool:
        """Whether any part is finite, or a schedule; if not, the optimizer only measures."""
        return any(bound is not None and bound != math.inf for bound in self._bounds)

    @property
    def is_scheduled(self) -> bool:
        """Whether any part is a callable of the step index."""
        return any(callable(bound) for bound in self._bounds)

    def check_slices(self, names: Iterable[str] | None) -> None:
        """Refuse a budget for slices that the KL closure does not have.

        Args:
            names: the closure's slices; None if it cannot say before it is called.
        """
        if names is None or self.slices is None:
            return
        known = sorted(names)
        if not known:
            raise ValueError(
                f"budget.slices={self.slices!r}, but the control set has no slices; name some with "
                "slices={...} there, or leave budget.slices out"
            )
        if isinstance(self.slices, Mapping):
            for name in self.slices:
                if name not in known:
                    raise ValueError(f"budget.slices names the unknown slice {name!r}; known slices: {known}")

    def at(self, step: int, slices: Iterable[str] = ()) -> Limits:
        """Resolve schedules at a step index, for the slices that exist."""
        if isinstance(self.slices, Mapping):
            limits = {name: _at(bound, step, f"slices[{name!r}]") for name, bound in self.slices.items()}
        else:
            limit = _at(self.slices, step, "slices")
            limits = dict.fromkeys(slices, limit) if limit < math.inf else {}
        return Limits(_at(self.mean, step, "mean"), limits, _at(self.reference, step, "reference"))


def _at(bound: Bound | None, step: int, name: str) -> float:
    if bound is None:
        return math.inf
    return _checked(bound(step) if callable(bound) else bound, name)


def _checked(value: object, name: str) -> float:
    if isinstance(value, bool) or not (isinstance(value, Real) or hasattr(value, "__float__")):
        raise TypeError(f"budget.{name}={value!r} is no number; give nats per token, or a callable of the step")
    number = float(value)
    if math.isnan(number) or number < 0:
        raise ValueError(
            f"budget.{name}={value!r} must be a KL >= 0 in nats per token (0.03, say; math.inf turns it off)"
        )
    return number


def _ratio(kl: float, limit: float) -> float:
    if limit > 0:
        return kl / limit
    return 0.0 if kl == 0 else math.inf
