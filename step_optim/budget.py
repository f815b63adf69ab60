"""Budgets: how far one step may move the policy, and whether a movement is within them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TypeAlias

from step_optim.movement import Movement

Bound: TypeAlias = "float | Callable[[int], float]"
"""A number of nats per token, or a schedule: step index -> number."""


@dataclass(frozen=True)
class Verdict:
    """Whether a movement is within its limits, and which limit is nearest or most exceeded."""

    ratios: Mapping[str, float]
    """KL / budget by constraint: ``"mean"``, ``"slice:<name>"``, ``"drift"``, ``"drift:<name>"``; no infinite ones."""

    finite: bool = True
    """False if a measured figure, or the update itself, is NaN or infinite: never feasible."""

    @property
    def feasible(self) -> bool:
        """K_global <= eps_g, K_s <= eps_s for every slice, the same for drift and its caps, all of them finite."""
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

    drift: float = math.inf
    """Cap on the global drift from pi_ref."""

    drift_slices: Mapping[str, float] = field(default_factory=dict)
    """Cap on the drift of each slice."""

    @property
    def reference(self) -> float:
        """Another name of `drift`."""
        return self.drift

    @property
    def caps_drift(self) -> bool:
        """Whether any cap is finite, so that a point has to be compared with pi_ref too."""
        return min(self.drift, *self.drift_slices.values(), math.inf) < math.inf

    @property
    def limits_anything(self) -> bool:
        """Whether any part is finite."""
        return self.caps_drift or min(self.mean, *self.slices.values(), math.inf) < math.inf

    def of(self, name: str) -> float:
        """Return the limit of a constraint, by its name in `Verdict.ratios`.

        >>> Limits(mean=0.03, drift_slices={"safety": 0.01}).of("drift:safety")
        0.01
        """
        kind, _, part = name.partition(":")
        if part:
            return (self.drift_slices if kind == "drift" else self.slices)[part]
        return self.drift if kind == "drift" else self.mean

    def without_caps(self) -> Limits:
        """Return the budgets on the step alone."""
        return Limits(self.mean, self.slices)

    def exceeded_by(self, drift: Movement | None) -> tuple[str, ...]:
        """Return the caps that a drift is beyond: ``"drift"``, ``"drift:<slice>"``."""
        if drift is None or not self.caps_drift:
            return ()
        caps = self.without_budgets().judge(drift.still(), drift).ratios
        return tuple(name for name, ratio in caps.items() if ratio > 1)

    def without_budgets(self) -> Limits:
        """Return the caps on the drift alone."""
        return Limits(drift=self.drift, drift_slices=self.drift_slices)

    def on_the_way_back(self, drift: Movement | None) -> Limits:
        """Return the limits of a step from a policy with this drift: a cap that it exceeds becomes "less than now".

        A run that was resumed with a lower cap could otherwise never come back.

        >>> Limits(drift=0.05).on_the_way_back(Movement(0.09)).judge(Movement(0.01), Movement(0.08)).feasible
        True
        """
        if not self.exceeded_by(drift):
            return self
        assert drift is not None

        def less(cap: float, now: float) -> float:
            return math.nextafter(now, 0.0) if now > cap else cap

        slices = {name: less(cap, drift.slices[name]) for name, cap in self.drift_slices.items()}
        return replace(self, drift=less(self.drift, drift.mean), drift_slices=slices)

    def judge(self, movement: Movement, drift: Movement | None = None) -> Verdict:
        """Compare a movement (and the drift from pi_ref) with these limits.

        The paper's trust region (section 3.2): K_global <= eps_g and max_s K_s <= eps_s.

        >>> Limits(mean=0.03).judge(Movement(0.06)).ratios
        {'mean': 2.0}

        Raises:
            ValueError: a limited slice, or the drift, was not measured.
        """
        measured = [("mean", movement.mean, self.mean)]
        measured += [(f"slice:{name}", kl, cap) for name, kl, cap in _slices(movement, self.slices, "slices")]
        if self.caps_drift:
            if drift is None:
                raise ValueError("budget.drift needs a KL closure that measures drift (TokenKL, PolicyKL)")
            measured.append(("drift", drift.mean, self.drift))
            measured += [
                (f"drift:{name}", kl, cap) for name, kl, cap in _slices(drift, self.drift_slices, "drift_slices")
            ]
        ratios = {name: _ratio(kl, limit) for name, kl, limit in measured if limit < math.inf}
        return Verdict(ratios, finite=movement.is_finite and (drift is None or drift.is_finite))


@dataclass(frozen=True, init=False)
class Budget:
    """Movement allowed per step, and from the start of training, in nats per token.

    Args:
        mean: eps_g, for the mean over all control prompts, of one step.
        slices: eps_s: one number for every slice, or a mapping slice -> number
            (slices that it does not name are unlimited).
        drift: cap on the mean drift from pi_ref, the policy at the start
            of training.
        drift_slices: cap on the drift of slices, like ``slices``.
        reference: another name of ``drift``.

    Each number may be a callable of the step index (a schedule), and
    ``math.inf`` turns a part off: ``Budget(mean=math.inf)`` only measures.

    Raises:
        ValueError: NaN, negative, or nothing limited at all.
        TypeError: not a number and not callable; both ``drift`` and ``reference``.

    >>> Budget(mean=0.03, slices={"safety": 0.01}).at(0, ["math", "safety"]).slices
    {'safety': 0.01}
    >>> Budget(reference=0.05) == Budget(drift=0.05)
    True
    """

    mean: Bound | None
    slices: Bound | Mapping[str, Bound] | None
    drift: Bound | None
    drift_slices: Bound | Mapping[str, Bound] | None

    def __init__(
        self,
        mean: Bound | None = None,
        slices: Bound | Mapping[str, Bound] | None = None,
        drift: Bound | None = None,
        drift_slices: Bound | Mapping[str, Bound] | None = None,
        *,
        reference: Bound | None = None,
    ) -> None:
        """Refuse bad numbers now, before any weight moves."""
        if reference is not None and drift is not None:
            raise TypeError(f"drift={drift!r} and reference={reference!r} are two names of one cap; give one of them")
        cap = drift if reference is None else reference
        given = {"mean": mean, "slices": slices, "drift": cap, "drift_slices": drift_slices}
        if all(bound is None for bound in given.values()):
            raise ValueError(
                "Budget() limits nothing; pass mean=, slices=, drift= or drift_slices= in nats per token "
                "(mean=math.inf to only measure)"
            )
        for name, bound in given.items():
            called = "reference" if name == "drift" and reference is not None else name
            _check(bound, called, may_map="slices" in name)
            object.__setattr__(self, name, bound)

    @classmethod
    def of(cls, value: Budget | Bound) -> Budget:
        """Read ``budget=0.03`` as ``Budget(mean=0.03)``."""
        return value if isinstance(value, Budget) else cls(mean=value)

    @property
    def reference(self) -> Bound | None:
        """Another name of `drift`."""
        return self.drift

    @property
    def _bounds(self) -> list[Bound | None]:
        by_slice = (bound for part in (self.slices, self.drift_slices) for bound in _members(part))
        return [self.mean, self.drift, *by_slice]

    @property
    def limits_anything(self) -> bool:
        """Whether any part is finite, or a schedule; if not, the optimizer only measures."""
        return any(bound is not None and bound != math.inf for bound in self._bounds)

    @property
    def caps_drift(self) -> bool:
        """Whether there is a cap on the drift, finite or a schedule."""
        caps = [self.drift, *_members(self.drift_slices)]
        return any(bound is not None and bound != math.inf for bound in caps)

    @property
    def is_scheduled(self) -> bool:
        """Whether any part is a callable of the step index."""
        return any(callable(bound) for bound in self._bounds)

    def check_slices(self, names: Iterable[str] | None) -> None:
        """Refuse a budget for slices that the KL closure does not have.

        Args:
            names: the closure's slices; None if it cannot say before it is called.
        """
        parts = [("slices", self.slices), ("drift_slices", self.drift_slices)]
        for part, bounds in parts:
            if names is None or bounds is None:
                continue
            known = sorted(names)
            if not known:
                raise ValueError(
                    f"budget.{part}={bounds!r}, but the control set has no slices; name some with "
                    f"slices={{...}} there, or leave budget.{part} out"
                )
            unknown = [name for name in bounds if name not in known] if isinstance(bounds, Mapping) else []
            if unknown:
                raise ValueError(f"budget.{part} names the unknown slice {unknown[0]!r}; known slices: {known}")

    def at(self, step: int, slices: Iterable[str] = ()) -> Limits:
        """Resolve schedules at a step index, for the slices that exist."""
        names = list(slices)
        return Limits(
            _at(self.mean, step, "mean"),
            _each_at(self.slices, step, "slices", names),
            _at(self.drift, step, "drift"),
            _each_at(self.drift_slices, step, "drift_slices", names),
        )


def _members(bounds: Bound | Mapping[str, Bound] | None) -> list[Bound | None]:
    return list(bounds.values()) if isinstance(bounds, Mapping) else [bounds]


def _check(bound: Bound | Mapping[str, Bound] | None, name: str, *, may_map: bool) -> None:
    """Refuse what is no number, no schedule, and no mapping of them."""
    if may_map and isinstance(bound, Mapping):
        if not bound:
            raise ValueError(f"budget.{name}={{}} limits no slice; leave it out or name a slice")
        for key, each in bound.items():
            _check(each, f"{name}[{key!r}]", may_map=False)
    elif bound is not None and not callable(bound):
        _checked(bound, name)


def _slices(movement: Movement, limits: Mapping[str, float], part: str) -> Iterator[tuple[str, float, float]]:
    """Yield (slice, what it reads, its limit)."""
    for name, limit in limits.items():
        if name not in movement.slices:
            raise ValueError(f"budget.{part} limits {name!r}, but the KL closure measured {sorted(movement.slices)}")
        yield name, movement.slices[name], limit


def _each_at(
    bounds: Bound | Mapping[str, Bound] | None, step: int, name: str, slices: Sequence[str]
) -> dict[str, float]:
    """Resolve what limits slices: of those that a mapping names, else of all of them."""
    if isinstance(bounds, Mapping):
        return {key: _at(bound, step, f"{name}[{key!r}]") for key, bound in bounds.items()}
    limit = _at(bounds, step, name)
    return dict.fromkeys(slices, limit) if limit < math.inf else {}


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
