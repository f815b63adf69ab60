"""One bound of a budget: a number or a schedule, of one figure or of each slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TypeAlias

Bound: TypeAlias = "float | Callable[[int], float]"
"""A number of nats per token, or a schedule: step index -> number."""

Bounds: TypeAlias = "Bound | Mapping[str, Bound] | None"
"""Of slices: one for all of them, or one for each that is named; None for no bound."""


def of_slice(bounds: Bounds, name: str) -> Bound | None:
    """Return the bound of one slice.

    >>> of_slice({"math": 0.1}, "math"), of_slice({"math": 0.1}, "safety"), of_slice(0.2, "safety")
    (0.1, None, 0.2)
    """
    return bounds.get(name) if isinstance(bounds, Mapping) else bounds


def members(bounds: Bounds) -> list[Bound | None]:
    """Return all bounds that there are."""
    return list(bounds.values()) if isinstance(bounds, Mapping) else [bounds]


def check_bound(bound: Bounds, name: str, *, may_map: bool) -> None:
    """Refuse what is no number, no schedule, and no mapping of them.

    Args:
        bound: what was given.
        name: the argument's, for the message.
        may_map: whether a mapping slice -> bound will do.

    Raises:
        TypeError: it is of another kind.
        ValueError: NaN, a negative number, or an empty mapping.
    """
    if may_map and isinstance(bound, Mapping):
        if not bound:
            raise ValueError(f"budget.{name}={{}} limits no slice; leave it out or name a slice")
        for key, each in bound.items():
            check_bound(each, f"{name}[{key!r}]", may_map=False)
    elif bound is not None and not callable(bound):
        _number(bound, name)


def resolved(bound: Bound | None, step: int, name: str) -> float:
    """Return the limit at a step index [nats per token]; infinite where there is no bound.

    >>> resolved(lambda step: 0.1 / (1 + step), 1, "mean")
    0.05
    """
    if bound is None:
        return math.inf
    return _number(bound(step) if callable(bound) else bound, name)


def resolved_slices(bounds: Bounds, step: int, name: str, slices: Sequence[str]) -> dict[str, float]:
    """Resolve what limits slices: of those that a mapping names, else of all of them."""
    if isinstance(bounds, Mapping):
        return {key: resolved(bound, step, f"{name}[{key!r}]") for key, bound in bounds.items()}
    limit = resolved(bounds, step, name)
    return dict.fromkeys(slices, limit) if limit < math.inf else {}


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not (isinstance(value, Real) or hasattr(value, "__float__")):
        raise TypeError(f"budget.{name}={value!r} is no number; give nats per token, or a callable of the step")
    number = float(value)
    if math.isnan(number) or number < 0:
        raise ValueError(
            f"budget.{name}={value!r} must be a KL >= 0 in nats per token (0.03, say; math.inf turns it off)"
        )
    return number
