"""A budget as it is written on a command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from step_optim.budget import Budget

WHOLE = ("mean", "slices", "drift", "prompt", "token")
"""Constraints that need no slice's name."""

SYNTAX = "mean=0.01, slices=0.02, slice:NAME=0.005, drift=0.05, drift:NAME=0.02, prompt=0.5 or token=2"


def read_budget(words: Sequence[str], slices: Iterable[str] = ()) -> Budget:
    """Read a budget from words, ``mean=0.01 slice:safety=0.005``; a number alone is the mean's.

    Args:
        words: one for each limit [nats per token], in any order.
        slices: those that there are. With ``slices=`` and ``slice:NAME=`` together, the first one is for the others.

    Raises:
        ValueError: a word that is none, or two for one limit.

    >>> read_budget(["0.01", "slices=0.02", "slice:safety=0.005"], ["math", "safety"]).slices
    {'math': 0.02, 'safety': 0.005}
    """
    limits = _by_name(words)
    by_slice, drifts = _named(limits, "slice:"), _named(limits, "drift:")
    everywhere = limits.get("slices")
    if everywhere is not None and by_slice:
        by_slice = dict.fromkeys(slices, everywhere) | by_slice
    return Budget(
        mean=limits.get("mean"),
        slices=by_slice or everywhere,
        drift=limits.get("drift"),
        drift_slices=drifts or None,
        prompt=limits.get("prompt"),
        token=limits.get("token"),
    )


def _by_name(words: Sequence[str]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for word in words:
        name, number = _read(word)
        if name in limits:
            raise ValueError(f"--budget {word}: {name} has a limit already, {limits[name]:g}; give one of them")
        limits[name] = number
    return limits


def _read(word: str) -> tuple[str, float]:
    """Return the name of a limit and its number."""
    name, equals, text = word.rpartition("=")
    name = name if equals else "mean"
    kind, colon, slice_ = name.partition(":")
    if not (name in WHOLE or (colon and slice_ and kind in ("slice", "drift"))):
        raise ValueError(f"--budget {word}: {name!r} is no limit of a budget that a log can answer; write {SYNTAX}")
    try:
        return name, float(text)
    except ValueError:
        raise ValueError(f"--budget {word}: {text!r} is no number [nats per token]; write {SYNTAX}") from None


def _named(limits: Mapping[str, float], kind: str) -> dict[str, float]:
    """Limits of one kind by slice."""
    return {name.removeprefix(kind): number for name, number in limits.items() if name.startswith(kind)}
