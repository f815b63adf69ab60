"""Which prompts of a control set are held out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from step_optim.control.listing import is_list, listed, plain, shown
from step_optim.control.slices import checked_indices

FAIR_DRAWS = 100
"""Attempts to split overlapping slices so that both parts keep all of them; a partition needs one."""


def held_out_prompts(
    held_out: float | Sequence[int] | Sequence[str],
    slices: Mapping[str, Sequence[int]],
    keys: Sequence[Hashable],
    seed: int,
) -> set[int]:
    """Return the prompts that are held out, some but not all; equal ones, with other responses, stay together.

    >>> sorted(held_out_prompts(["b"], {"a": [0, 1], "b": [2]}, "xyz", seed=0))
    [2]

    Args:
        held_out: a fraction, drawn within every slice (and among the prompts
            in none); or prompt indices; or names of slices.
        slices: prompt indices by name.
        keys: what each of the C prompts is told by.
        seed: of the draw.

    Raises:
        TypeError: none of these forms.
        ValueError: a fraction out of range, an unknown slice or prompt, a part without prompts, or one prompt in both.
    """
    count, fraction = len(keys), plain(held_out)
    firsts: dict[Hashable, int] = {}
    first = [firsts.setdefault(key, i) for i, key in enumerate(keys)]
    if isinstance(fraction, (int, float)):
        alone = {name: list(dict.fromkeys(first[i] for i in members)) for name, members in slices.items()}
        drawn = _drawn(fraction, alone, sorted(set(first)), seed)
        out = {i for i in range(count) if first[i] in drawn}
    else:
        out = _named([held_out] if isinstance(held_out, str) else held_out, slices, count)
        torn = [i for i in range(count) if (i in out) != (first[i] in out)]
        if torn:
            raise ValueError(
                f"held_out={held_out!r:.80} puts one prompt into both parts: {first[torn[0]]} and {torn[0]} are the "
                "same, with two responses; name both, or neither"
            )
    if not out or len(out) == count:
        raise ValueError(f"held_out={held_out!r} leaves one part of {count} prompts empty")
    return out


def _drawn(fraction: float, slices: Mapping[str, Sequence[int]], prompts: Sequence[int], seed: int) -> set[int]:
    """A fraction of every slice, and of the prompts in none."""
    if not 0 < fraction < 1:
        raise ValueError(f"held_out={fraction} must lie between 0 and 1, or list prompts or slices")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    covered = {i for members in slices.values() for i in members}
    rest = [i for i in prompts if i not in covered]
    parts = [list(members) for members in slices.values()] + ([rest] if rest else [])
    for _ in range(FAIR_DRAWS):
        drawn = _draw(parts, fraction, generator)
        if all(0 < len(drawn.intersection(part)) < len(part) for part in parts if len(part) > 1):
            break
    return drawn


def _draw(parts: list[list[int]], fraction: float, generator: torch.Generator) -> set[int]:
    """Draw a fraction of every part, never the last of any."""
    drawn: set[int] = set()
    for part in parts:
        wanted = min(max(1, round(fraction * len(part))), len(part) - 1)
        for place in torch.randperm(len(part), generator=generator, device="cpu").tolist():
            i = part[place]
            if len(drawn.intersection(part)) < wanted and all(
                set(other) - drawn - {i} for other in parts if i in other
            ):
                drawn.add(i)
    return drawn


def _named(held_out: Any, slices: Mapping[str, Sequence[int]], count: int) -> set[int]:
    """Prompts that are listed, or whose slices are."""
    if not is_list(held_out, ordered=False):
        raise TypeError(f"held_out={shown(held_out)} is no fraction; or give prompt indices, or names of slices")
    items = [plain(item) for item in listed(held_out)]
    names = [item for item in items if isinstance(item, str)]
    unknown = [name for name in names if name not in slices]
    if unknown:
        raise ValueError(f"held_out names unknown slices {unknown}; known slices: {sorted(slices)}")
    others = checked_indices([item for item in items if not isinstance(item, str)], count, "held_out")
    return {i for name in names for i in slices[name]}.union(others)
