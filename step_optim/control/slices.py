"""Named slices of the control prompts, as they are given and as they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step_optim.control.listing import is_list, listed, plain, shown

Slices = Mapping[str, Sequence[int]] | Sequence[str]
"""Members by name (prompt indices, or a boolean mask [C]); or C labels, the name of the slice of each prompt."""

_BOTH_FORMS = 'give {"math": [0, 1], ...}, or one label for each prompt, ["math", "math", ...]'


def checked_slices(slices: Slices | None, count: int) -> dict[str, tuple[int, ...]]:
    """Return the prompt indices of each slice.

    >>> checked_slices(["math", "math", "safety"], 3) == checked_slices({"math": [0, 1], "safety": [2]}, 3)
    True

    Args:
        slices: prompt indices or a boolean mask [C] by slice name; or one
            label for each prompt; or None.
        count: C, the number of prompts.

    Raises:
        TypeError: not in one of these forms, or a member that is no index.
        ValueError: an empty, doubled or out-of-range slice; or a mask or
            labels of another length than C.
    """
    checked = {}
    for name, members in _by_name(slices, count).items():
        if not isinstance(name, str):
            raise TypeError(f"slice names are texts, not {name!r}")
        if name == "mean":
            raise ValueError("a slice cannot be named 'mean': that is the global movement; choose another name")
        indices = checked_indices(members, count, f"slice {name!r}")
        if not indices:
            raise ValueError(f"slice {name!r} is empty; give it a prompt or leave it out")
        checked[name] = indices
    return checked


def by_text(slices: Any, prompts: Sequence[Any]) -> Any:
    """Replace members that are prompts themselves by the indices of these prompts.

    Raises:
        ValueError: a text that is none of the prompts.
    """
    if not isinstance(slices, Mapping):
        return slices
    return {
        name: _places(members, prompts, name) if is_list(members, ordered=False) else members
        for name, members in slices.items()
    }


def checked_indices(members: Any, count: int, what: str) -> tuple[int, ...]:
    """Return prompt indices, given as such or as a boolean mask [C].

    Raises:
        TypeError: no list, or one of anything else than whole numbers.
        ValueError: an index that no prompt has, or one given twice; or a mask of another length.
    """
    if not is_list(members, ordered=False):
        raise TypeError(f"{what} is {shown(members)}; give a list of prompt indices, such as [0, 1]")
    values = [plain(value) for value in listed(members)]
    if any(isinstance(value, bool) for value in values):
        values = _chosen(values, count, what)
    indices = tuple(_checked_index(value, count, what) for value in values)
    if len(set(indices)) != len(indices):
        raise ValueError(f"{what} names a prompt twice: {list(indices)}")
    return indices


def _by_name(slices: Any, count: int) -> Mapping[Any, Any]:
    """Slices by name, also from labels."""
    if slices is None or isinstance(slices, Mapping):
        return slices or {}
    if not is_list(slices):
        raise TypeError(f"slices={shown(slices)} is neither a mapping nor a list of labels; {_BOTH_FORMS}")
    labels = [plain(label) for label in listed(slices)]
    for i, label in enumerate(labels):
        if not isinstance(label, str):
            raise TypeError(f"slices: the label of prompt {i} is {shown(label)}, and labels are texts; {_BOTH_FORMS}")
    if labels and len(labels) != count:
        raise ValueError(f"slices has {len(labels)} labels for {count} prompts; {_BOTH_FORMS}")
    members: dict[Any, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    return members


def _places(members: Any, prompts: Sequence[Any], name: Any) -> list[Any]:
    places, texts = [], dict[str, list[int]]()
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            texts.setdefault(prompt, []).append(i)
    for member in listed(members):
        if not isinstance(member, (str, Mapping, list, tuple)):
            places.append(member)
            continue
        if isinstance(member, str):
            found = texts.get(member, [])
        else:
            found = [i for i, prompt in enumerate(prompts) if prompt == member]
        if not found:
            raise ValueError(
                f"slice {name!r} names {shown(member)}, which is none of the prompts; repeat its whole text"
            )
        places += found
    return places


def _chosen(mask: list[Any], count: int, what: str) -> list[int]:
    if len(mask) != count or not all(isinstance(value, bool) for value in mask):
        raise ValueError(f"{what} is a mask of {len(mask)} for {count} prompts; give one flag for each")
    return [i for i, chosen in enumerate(mask) if chosen]


def _checked_index(index: Any, count: int, what: str) -> int:
    if isinstance(index, str):
        raise TypeError(
            f"{what} names a prompt by its text, {shown(index)}; only ControlSet.from_texts knows texts, "
            "so give prompt indices here"
        )
    if not isinstance(index, int):
        raise TypeError(f"{what} holds {shown(index)}; give prompt indices, which are whole numbers")
    if not 0 <= index < count:
        raise ValueError(f"{what} holds {index}, but prompts are numbered 0 to {count - 1}")
    return index
