"""How early each layer's step is made: weights by depth, by name patterns, or by a function of the name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, TypeAlias

ByLayer: TypeAlias = "str | Mapping[str, float] | Callable[[str], float]"

OTHERS = ("others", 1.0)
"""Layer and weight of what a mapping does not name."""

UNNAMED = ("unnamed", 1.0)
"""Layer and weight of what is no parameter of a module that the policy reads."""

_NUMBER = re.compile(r"(?:^|[.:])(\d+)(?:\.|$)")


def depths(names: Sequence[str]) -> dict[str, int]:
    """Return the depth of each parameter, 0 for the first layer.

    A stack of layers is what its names number: ``model.layers.7.self_attn...``.
    Only the first number of a name counts, so that experts inside a layer are
    of its depth, and an adapter's matrices of the layer that they are in. What
    stands before all stacks (embeddings) has depth 0, what stands after them
    (the last norm, the head) the largest; several stacks follow each other.

    Args:
        names: of all parameters of a model, in its order.

    >>> depths(["embed.weight", "layers.0.a", "layers.0.experts.1.b", "layers.1.a", "norm.weight"])
    {'embed.weight': 0, 'layers.0.a': 1, 'layers.0.experts.1.b': 1, 'layers.1.a': 2, 'norm.weight': 3}
    """
    stacks: dict[str, dict[int, None]] = {}
    for name in names:
        if number := _NUMBER.search(name):
            stacks.setdefault(name[: number.start()], {}).setdefault(int(number[1]))
    first, last = 0, 1
    place: dict[tuple[str, int], int] = {}
    most = max(map(len, stacks.values()), default=0)
    for stack, numbers in stacks.items():
        if len(numbers) > 1 or most == 1:
            place |= {(stack, number): last + i for i, number in enumerate(numbers)}
            last += len(numbers)
    found, seen = {}, False
    for name in names:
        number = _NUMBER.search(name)
        depth = place.get((name[: number.start()], int(number[1]))) if number else None
        seen = seen or depth is not None
        found[name] = depth if depth is not None else last if seen else first
    used = sorted(set(found.values()))
    return {name: used.index(depth) for name, depth in found.items()}


def check_by_layer(by_layer: ByLayer | None) -> None:
    """Refuse what is no rule.

    Raises:
        ValueError: an unknown word, no pattern, or a weight that is not above 0.
        TypeError: anything else.
    """
    if by_layer is None or callable(by_layer):
        return
    if isinstance(by_layer, str):
        if by_layer != "linear":
            raise ValueError(f"by_layer={by_layer!r} is unknown; use 'linear', weights by name pattern, or a function")
        return
    if not isinstance(by_layer, Mapping):
        raise TypeError(f"by_layer={by_layer!r} is none of 'linear', a mapping of name patterns, and a function")
    if not by_layer:
        raise ValueError("by_layer={} has no pattern; use None to shorten all layers alike")
    for pattern, weight in by_layer.items():
        if not isinstance(pattern, str):
            raise TypeError(f"by_layer={by_layer!r}: {pattern!r} is no pattern of names; use texts, '*.layers.0.*'")
        _checked(weight, f"by_layer[{pattern!r}]")


def layer_weights(by_layer: ByLayer, names: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Return each parameter's layer, as records name it, and its weight.

    Args:
        by_layer: ``"linear"``: (1 + depth) / (number of depths). A mapping: of the first pattern (``*``, ``?``,
            ``[...]``) that a name matches, 1 if it matches none. A function: of the name.
        names: of all parameters of the model, in its order.

    Raises:
        ValueError: no name tells a depth, a pattern matches nothing, or a weight is not above 0.

    >>> layer_weights("linear", ["layers.0.a", "layers.1.a", "layers.1.b"])
    {'layers.0.a': ('layer 0', 0.5), 'layers.1.a': ('layer 1', 1.0), 'layers.1.b': ('layer 1', 1.0)}
    """
    if isinstance(by_layer, str):
        found = depths(names)
        count = 1 + max(found.values(), default=0)
        if count < 2:
            raise ValueError(
                f"by_layer={by_layer!r} needs numbered layers, as in layers.0.weight, and none of the {len(names)} "
                f"names that are known is like that{_some(names)} (PolicyKL knows the model with model=); use a "
                "mapping of name patterns, or None"
            )
        return {name: (f"layer {depth}", (1 + depth) / count) for name, depth in found.items()}
    if isinstance(by_layer, Mapping):
        chosen = {name: next((p for p in by_layer if fnmatchcase(name, p)), None) for name in names}
        unused = [pattern for pattern in by_layer if pattern not in chosen.values()]
        if unused:
            raise ValueError(f"by_layer: no parameter is left for the pattern {unused[0]!r}{_some(names)}")
        return {name: OTHERS if p is None else (p, float(by_layer[p])) for name, p in chosen.items()}
    return {name: (name, _checked(by_layer(name), f"by_layer({name!r})")) for name in names}


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''})" if names else ""


def _checked(weight: Any, what: str) -> float:
    if not (isinstance(weight, Real) and 0 < float(weight) < math.inf):
        raise ValueError(f"{what}={weight!r} must be a number above 0: how early that layer's step is made")
    return float(weight)
