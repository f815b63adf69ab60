"""Spans of response positions: the first tokens of every response, say, as one more slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The response tokens in a span."""

    rows: Tensor
    """[S] rows of the control set in it."""

    place: Tensor
    """[S] which of the span's prompts each row belongs to, from 0."""

    prompts: tuple[int, ...]
    """The prompts that have a token in it."""


def checked_spans(spans: Any, slices: Sequence[str], lengths: Sequence[int]) -> dict[str, slice]:
    """Read the argument ``spans=``.

    >>> checked_spans({"opening": (0, 5), "end": (-1, None)}, [], [4, 9])
    {'opening': slice(0, 5, None), 'end': slice(-1, None, None)}

    Args:
        spans: (start, stop) of response positions by name, as in a Python
            slice: ``(0, 5)`` are the first five tokens, ``(-5, None)`` the last five.
        slices: names that are taken.
        lengths: tokens of each response.

    Raises:
        TypeError: not in this form.
        ValueError: a name that is taken; a span in which no response has a token.
    """
    if spans is None:
        return {}
    if not isinstance(spans, Mapping):
        raise TypeError(f'spans={spans!r:.60} is no mapping; give (start, stop) by name, {{"opening": (0, 5)}}')
    check_names(spans, slices)
    checked = {}
    for name, ends in spans.items():
        checked[name] = _checked(name, ends)
        if not any(range(length)[checked[name]] for length in lengths):
            raise ValueError(
                f"spans[{name!r}]={tuple(ends)} holds no token of the control set, whose longest response has "
                f"{max(lengths)}: give (start, stop) with stop behind start, and positions that responses have"
            )
    return checked


def check_names(spans: Mapping[Any, Any], slices: Sequence[str]) -> None:
    """Refuse names of spans that are no texts, or that slices have.

    Raises:
        TypeError: a name that is no text.
        ValueError: one that is taken.
    """
    for name in spans:
        if not isinstance(name, str):
            raise TypeError(f"names of spans are texts, not {name!r}")
        if name == "mean" or name in slices:
            raise ValueError(f"spans names {name!r}, which is a slice already; choose another name")


def _checked(name: str, ends: Any) -> slice:
    if not isinstance(ends, (tuple, list)) or len(ends) != 2 or not all(_is_position(end) for end in ends):
        raise TypeError(f"spans[{name!r}]={ends!r:.60} is no (start, stop) of response positions, such as (0, 5)")
    return slice(*ends)


def _is_position(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def find_spans(
    spans: Mapping[str, slice], lengths: Sequence[int], device: torch.device | str = "cpu"
) -> dict[str, Span]:
    """Find the rows of each span.

    Args:
        spans: positions in a response.
        lengths: tokens of each response.
        device: where the tensors live.
    """
    first = [0, *accumulate(lengths)]
    found = {}
    for name, positions in spans.items():
        rows = [range(first[i], first[i + 1])[positions] for i in range(len(lengths))]
        prompts = tuple(i for i, chosen in enumerate(rows) if chosen)
        place = [k for k, i in enumerate(prompts) for _ in rows[i]]
        both = torch.tensor([[row for chosen in rows for row in chosen], place], dtype=torch.long, device="cpu")
        found[name] = Span(both[0].to(device), both[1].to(device), prompts)
    return found
