"""Named slices of the control prompts, as they are given and as they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

Slices = Mapping[str, Sequence[int]]


def checked_index(index: int, count: int, what: str) -> int:
    """Refuse an index that no prompt has."""
    if not 0 <= index < count:
        raise ValueError(f"{what} holds {index}, but prompts are numbered 0 to {count - 1}")
    return index


def checked_slices(slices: Slices, count: int) -> dict[str, tuple[int, ...]]:
    """Refuse empty, doubled or out-of-range slices."""
    checked = {}
    for name, members in slices.items():
        if name == "mean":
            raise ValueError("a slice cannot be named 'mean': that is the global movement; choose another name")
        if not isinstance(name, str):
            raise TypeError(f"slice names are texts, not {name!r}")
        indices = tuple(checked_index(int(i), count, f"slice {name!r}") for i in _members(members, count, name))
        if not indices:
            raise ValueError(f"slice {name!r} is empty; give it a prompt or leave it out")
        if len(set(indices)) != len(indices):
            raise ValueError(f"slice {name!r} names a prompt twice: {list(indices)}")
        checked[name] = indices
    return checked


def _members(members: Sequence[int] | Tensor, count: int, name: str) -> list[int]:
    """Prompt indices, also from a boolean mask."""
    values = members.tolist() if hasattr(members, "tolist") else list(members)
    if not any(isinstance(value, bool) for value in values):
        return values
    if len(values) != count or not all(isinstance(value, bool) for value in values):
        raise ValueError(f"slice {name!r} is a mask of {len(values)} for {count} prompts; give one flag for each")
    return [i for i, chosen in enumerate(values) if chosen]
