"""The prompts that come with the package: 50 in each of eight slices, one a line in ``standard_prompts.txt``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from step_optim.control.listing import is_list, shown
from step_optim.control.messages import Message
from step_optim.control.tokenizer import Tokenizer

PARTS = {"control": slice(0, 16), "pool": slice(16, 40), "held_out": slice(40, 50)}
"""Which lines of a slice belong to which part; no prompt is in two of them."""

PER_SLICE = {"control": 5, "pool": 12, "held_out": 5}
"""Prompts of each slice, unless a size is given."""


@cache
def every_prompt() -> dict[str, list[str]]:
    """Return all prompts by slice, in the order of the file.

    >>> {name: len(prompts) for name, prompts in every_prompt().items()}
    {'story': 50, 'fact': 50, 'math': 50, 'code': 50, 'format': 50, 'advice': 50, 'translation': 50, 'refusals': 50}
    """
    text = files("step_optim.control").joinpath("standard_prompts.txt").read_text(encoding="utf-8")
    prompts: dict[str, list[str]] = {}
    for line in filter(None, text.split("\n")):
        if line.startswith("# "):
            own = prompts.setdefault(line.removeprefix("# "), [])
        else:
            own.append(line)
    return prompts


def standard_prompts(
    size: int | None = None, slices: Sequence[str] | None = None, part: str = "control"
) -> dict[str, list[str]]:
    """Choose prompts by slice: the first ones of the part, so that a smaller choice is within a larger one.

    >>> standard_prompts(2, ["math", "fact"])
    {'math': ['A rectangle is three times as long as it is wide, and its perimeter is 64. Find its sides.'],
     'fact': ['What does the liver do in the human body?']}

    Args:
        size: how many in all, spread evenly; the first slices get the
            remainder. None: as many of each slice as `PER_SLICE` says.
        slices: some of the eight names, in any order; None: all of them.
        part: "control", "pool" or "held_out".

    Raises:
        TypeError: a size that is no whole number, or slices that are no list.
        ValueError: an unknown slice or part, a slice named twice, or a size
            below one prompt a slice or beyond what there is.
    """
    if part not in list(PARTS):
        raise ValueError(f"part={shown(part)} is unknown; known parts: {list(PARTS)}")
    own = {name: every_prompt()[name][PARTS[part]] for name in _names(slices)}
    whole, rest = divmod(_size(size, own, part), len(own))
    return {name: prompts[: whole + (place < rest)] for place, (name, prompts) in enumerate(own.items())}


def as_prompts(tokenizer: Any, texts: Sequence[str]) -> Sequence[str | list[Message]]:
    """Return the texts as messages of a user, if the tokenizer has a chat template; else as they are.

    Raises:
        TypeError: a tokenizer that is not callable.
    """
    if not Tokenizer(tokenizer).has_template:
        return texts
    return [[{"role": "user", "content": text}] for text in texts]


def _names(slices: Any) -> list[str]:
    known = list(every_prompt())
    if slices is None:
        return known
    if not is_list(slices):
        raise TypeError(f"slices={shown(slices)} is no list; give some of {known}")
    names = list(slices)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"slices has the unknown {unknown}; known slices: {known}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"slices={names} must name one slice or more, none of them twice; known slices: {known}")
    return names


def _size(size: Any, own: dict[str, list[str]], part: str) -> int:
    if size is None:
        return PER_SLICE[part] * len(own)
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"size={shown(size)} is no whole number; give how many prompts there are to be in all")
    most = sum(len(prompts) for prompts in own.values())
    if not len(own) <= size <= most:
        raise ValueError(
            f"size={size} must be at least {len(own)}, a prompt for each slice, and at most {most}: that many there "
            f"are in part {part!r} of {len(own)} slices"
        )
    return size
