"""Budgets: how far one step may move the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from step_optim.limits import Limits as Limits
from step_optim.limits import Verdict as Verdict

Bound: TypeAlias = "float | Callable[[int], float]"
"""A number of nats per token, or a schedule: step index -> number."""


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
        prompt: for the prompt of the control set that moves most, of one step.
        token: for the response token that moves most [nats], of one step.
        confidence: between 0.5 and 1. A mean, a slice or a drift is then held
            against its budget by its upper confidence bound over all prompts
            like these (see `precision.upper_bound`), instead of by itself.
        reference: another name of ``drift``.

    Each number may be a callable of the step index (a schedule), and
    ``math.inf`` turns a part off: ``Budget(mean=math.inf)`` only measures.

    Raises:
        ValueError: NaN, negative, or nothing limited at all; a confidence that is none.
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
    prompt: Bound | None = None
    token: Bound | None = None
    confidence: float | None = None

    def __init__(
        self,
        mean: Bound | None = None,
        slices: Bound | Mapping[str, Bound] | None = None,
        drift: Bound | None = None,
        drift_slices: Bound | Mapping[str, Bound] | None = None,
        *,
        prompt: Bound | None = None,
        token: Bound | None = None,
        confidence: float | None = None,
        reference: Bound | None = None,
    ) -> None:
        """Refuse bad numbers now, before any weight moves."""
        if reference is not None and drift is not None:
            raise TypeError(f"drift={drift!r} and reference={reference!r} are two names of one cap; give one of them")
        cap = drift if reference is None else reference
        given: dict[str, Any] = {"mean": mean, "slices": slices, "drift": cap, "drift_slices": drift_slices}
        given |= {"prompt": prompt, "token": token}
        if all(bound is None for bound in given.values()):
            raise ValueError(
                "Budget() limits nothing; pass mean=, slices=, drift= or drift_slices= in nats per token, or prompt= "
                "or token= for the worst one (mean=math.inf to only measure)"
            )
        for name, bound in given.items():
            called = "reference" if name == "drift" and reference is not None else name
            _check(bound, called, may_map="slices" in name)
            object.__setattr__(self, name, bound)
        object.__setattr__(self, "confidence", _checked_confidence(confidence))
        if confidence is not None and all(bound is None for bound in (mean, slices, cap, drift_slices)):
            raise ValueError(
                f"budget.confidence={confidence!r} is about means, and only prompt= or token= is limited; give mean=, "
                "slices=, drift= or drift_slices= too, or leave confidence out"
            )

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
        return [self.mean, self.drift, self.prompt, self.token, *by_slice]

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

    def limited_slices(self, slices: Iterable[str]) -> list[str]:
        """Return those of some slices that are limited, at any step.

        >>> Budget(mean=0.1, slices={"safety": 0.03}).limited_slices(["math", "safety"])
        ['safety']
        """
        parts = (self.slices, self.drift_slices)
        return [name for name in slices if any(_of_slice(part, name) not in (None, math.inf) for part in parts)]

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
            _at(self.prompt, step, "prompt"),
            _at(self.token, step, "token"),
            self.confidence,
        )


def _checked_confidence(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"budget.confidence={value!r} is no number; give 0.95, say")
    if not 0.5 <= float(value) < 1:
        raise ValueError(
            f"budget.confidence={value!r} must be at least 0.5 and below 1: 0.95 asks that the budget holds over all "
            "prompts like these in 95 of 100 cases"
        )
    return float(value)


def _of_slice(bounds: Bound | Mapping[str, Bound] | None, name: str) -> Bound | None:
    return bounds.get(name) if isinstance(bounds, Mapping) else bounds


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
