"""Parts of a model: which tensors are rolled back together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch.optim import Optimizer

from step_optim.controllers.layers import depths
from step_optim.snapshot.snapshot import Snapshot

By: TypeAlias = "str | Mapping[str, str] | Callable[[str], str]"

WORDS = ("group", "layer", "module")

UNNAMED, OTHERS = "unnamed", "others"
"""The parts of what is no parameter of a module that the policy reads, and of what a mapping does not name."""

_ADAPTER = re.compile(r"(^|\.)lora_\w+(\.|$)")
"""Where the names inside of a LoRA adapter begin: its matrices are one part with each other."""


def check_by(by: By) -> None:
    """Refuse what says no parts.

    Raises:
        ValueError: an unknown word, or no pattern.
        TypeError: anything else.
    """
    if isinstance(by, str):
        if by not in WORDS:
            raise ValueError(
                f"by={by!r} is unknown; use 'group', 'layer', 'module', parts by name pattern, or a function"
            )
    elif isinstance(by, Mapping):
        if not by:
            raise ValueError("by={} has no pattern; give {'*.q_proj.*': 'queries'}, say")
        if any(not isinstance(text, str) for pair in by.items() for text in pair):
            raise TypeError(f"by={by!r:.80} must map name patterns to names of parts, both of them texts")
    elif not callable(by):
        raise TypeError(
            f"by={by!r:.80} is none of 'group', 'layer', 'module', a mapping of name patterns, and a function"
        )


def parts_of(by: By, names: Mapping[str, int | None], optimizer: Optimizer, snapshot: Snapshot) -> dict[str, list[int]]:
    """Return the tensors of each part, by their places in the snapshot. A tied one is in the part of its first name.

    Args:
        by: as in `STEPOptimizer.attribute`.
        names: of the model's parameters, in its order: their places, None of those that the optimizer does not move.
        optimizer: has the parameter groups.
        snapshot: knows the places of its tensors.

    Raises:
        ValueError: no name is known; a pattern that no trained parameter is left for.
        TypeError: a function that does not return texts.
    """
    count = len(snapshot.previous)
    part_of = _groups(optimizer, snapshot) if by == "group" else _named(by, names)
    found: dict[str, list[int]] = {}
    for place in range(count):
        found.setdefault(part_of.get(place, UNNAMED), []).append(place)
    return found


def _groups(optimizer: Optimizer, snapshot: Snapshot) -> dict[int, str]:
    part_of: dict[int, str] = {}
    for i, group in enumerate(optimizer.param_groups):
        places = snapshot.names({str(j): parameter for j, parameter in enumerate(group["params"])})
        for place in places.values():
            if place is not None:
                part_of.setdefault(place, f"group {i}")
    return part_of


def _named(by: By, names: Mapping[str, int | None]) -> dict[int, str]:
    if not names:
        raise ValueError(
            f"by={by!r:.80} needs the names of the parameters, and the kept step has none (PolicyKL knows the model "
            "with model=); use 'group'"
        )
    labels = _labels(by, list(names), [name for name, place in names.items() if place is not None])
    part_of: dict[int, str] = {}
    for name, place in names.items():
        if place is not None:
            part_of.setdefault(place, labels[name])
    return part_of


def _labels(by: By, names: Sequence[str], moved: Sequence[str]) -> dict[str, str]:
    """The part of each name."""
    if by == "layer":
        return {name: f"layer {depth}" for name, depth in depths(names).items()}
    if by == "module":
        return {name: module_of(name) for name in moved}
    if isinstance(by, Mapping):
        chosen = {name: next((p for p in by if fnmatchcase(name, p)), None) for name in moved}
        unused = [pattern for pattern in by if pattern not in chosen.values()]
        if unused:
            raise ValueError(f"by: no parameter that the optimizer moves is left for the pattern {unused[0]!r}")
        return {name: OTHERS if pattern is None else by[pattern] for name, pattern in chosen.items()}
    assert callable(by)
    return {name: _text(by(name), name) for name in moved}


def _text(part: Any, name: str) -> str:
    if not isinstance(part, str):
        raise TypeError(f"by({name!r}) returned {part!r:.60}; return the name of a part")
    return part


def module_of(name: str) -> str:
    """Return the module that owns a parameter; of a LoRA adapter's matrices the module that they adapt.

    >>> module_of("layers.0.mlp.weight"), module_of("layers.0.q_proj.lora_A.default.weight"), module_of("weight")
    ('layers.0.mlp', 'layers.0.q_proj', 'the model')
    """
    adapter = _ADAPTER.search(name)
    owner = name[: adapter.start()] if adapter else name.rpartition(".")[0]
    return owner or "the model"
