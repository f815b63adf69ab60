"""Further prompts beside the control set, and draws from a pool of them: which prompts, by whose turn it is."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from itertools import chain, zip_longest
from typing import Any

from step_optim.control.control_set import ControlBatches, ControlSet

CALLED = {"pool": "the pool", "held_out": "the held-out set"}
"""In words."""

EVERY = 10
"""Steps from one held-out measurement to the next, by default."""

WHY = {
    "pool": "who is steered by a prompt cannot be judged by it",
    "held_out": "it could not tell how far figures carry to other prompts",
}
"""Why they must be apart."""


def checked_apart(
    name: str, given: Any, control: ControlSet, vocabulary: int, *others: ControlSet | None
) -> ControlSet:
    """Refuse a pool, or held-out prompts, that cannot be told from the control set.

    Args:
        name: of the argument.
        given: its value.
        control: the prompts that judge.
        vocabulary: V of the model.
        *others: further sets that it must not share a prompt with.

    Raises:
        TypeError: it is no ControlSet.
        ValueError: it shares a prompt with the control set, is on another device, or has ids outside the vocabulary.
    """
    if not isinstance(given, ControlSet):
        raise TypeError(f"{name}={given!r:.60} is no ControlSet; build one with ControlSet.from_texts/from_ids")
    if isinstance(given, ControlBatches) != isinstance(control, ControlBatches):
        raise TypeError(f"{name}={given!r} and control={control!r}: give both as batches, or both as prompts")
    if given.device != control.device:
        raise ValueError(f"{name} is on {given.device}, the control set on {control.device}; use {name}.to(...)")
    if not isinstance(given, ControlBatches):  # their ids are perhaps no tokens that the model has logits of
        given.check_vocabulary(vocabulary)
    given.check_responses(vocabulary)
    keys = keys_of(given, control)
    for known, called in ((control, "the control set"), *((other, "the pool") for other in others)):
        if known is not None:
            _check_disjoint(name, keys, keys_of(known, control), called)
    return given


def _check_disjoint(name: str, given: Sequence[Hashable], known: Sequence[Hashable], called: str) -> None:
    places = {key: j for j, key in enumerate(known)}
    for i, key in enumerate(given):
        j = places.get(key)
        if j is not None:
            raise ValueError(
                f"prompt {i} of {CALLED[name]} is prompt {j} of {called}: {WHY[name]}. Take it out of one of them; "
                "ControlSet.split makes disjoint sets, and so do the parts of ControlSet.standard"
            )


def checked_every(every: Any, *, held_out: bool) -> int:
    """Read the argument ``every=``; None is `EVERY`.

    Raises:
        ValueError: it is no whole number above 0; or there are no held-out prompts.
    """
    if every is None:
        return EVERY
    if not held_out:
        raise ValueError(f"every={every!r} has no effect without held_out=; give held-out prompts, or leave it out")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r} must be a whole number of steps, at least 1")
    return every


def keys_of(prompts: ControlSet, control: ControlSet) -> list[Hashable]:
    """What each prompt is told by, to be compared with those of a control set."""
    if isinstance(prompts, ControlBatches) and isinstance(control, ControlBatches):
        return [*prompts.keys(shift=control.shift)]
    return [tuple(prompt.tolist()) for prompt in prompts.prompts]


def drawn(prompts: Sequence[int], slices: Sequence[Sequence[int]], count: int, turn: int) -> list[int]:
    """Return the prompts of one draw.

    The pool is gone through in rounds, each in a new random order in which the
    slices alternate: every draw has prompts of all slices, as far as it is
    large enough, and no prompt is drawn twice in a round.

    Args:
        prompts: those that may be drawn.
        slices: what they are members of.
        count: how many; all if there are no more.
        turn: how many draws of this size there were before.

    >>> sorted([*drawn(range(4), [], 2, 0), *drawn(range(4), [], 2, 1)])
    [0, 1, 2, 3]
    """
    size = min(count, len(prompts))
    around, place = divmod(turn, len(prompts) // size)
    return _order(prompts, slices, around)[place * size : (place + 1) * size]


def _order(prompts: Sequence[int], slices: Sequence[Sequence[int]], around: int) -> list[int]:
    """Shuffle for one round; slices alternate."""
    shuffled = list(prompts)
    random.Random(around).shuffle(shuffled)
    rest, piles = set(shuffled), []
    for members in slices:
        own = set(members)
        piles.append([prompt for prompt in shuffled if prompt in own and prompt in rest])
        rest -= own
    piles.append([prompt for prompt in shuffled if prompt in rest])
    mixed = chain.from_iterable(zip_longest(*(pile for pile in piles if pile)))
    return [prompt for prompt in mixed if prompt is not None]
