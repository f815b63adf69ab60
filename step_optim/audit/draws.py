"""Draws from a pool: which prompts, by whose turn it is."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from itertools import chain, zip_longest

from step_optim.control.control_set import ControlBatches, ControlSet


def checked_pool(pool: ControlSet, control: ControlSet, vocabulary: int) -> ControlSet:
    """Refuse a pool that cannot be told from the control set.

    Raises:
        TypeError: it is no ControlSet.
        ValueError: it shares a prompt with the control set, is on another device, or has ids outside the vocabulary.
    """
    if not isinstance(pool, ControlSet):
        raise TypeError(f"pool={pool!r:.60} is no ControlSet; build one with ControlSet.from_texts/from_ids")
    if isinstance(pool, ControlBatches) != isinstance(control, ControlBatches):
        raise TypeError(f"pool={pool!r} and control={control!r}: give both as batches, or both as prompts")
    if pool.device != control.device:
        raise ValueError(f"the pool is on {pool.device}, the control set on {control.device}; use pool.to(...)")
    if not isinstance(pool, ControlBatches):  # their ids are perhaps no tokens that the model has logits of
        pool.check_vocabulary(vocabulary)
    pool.check_responses(vocabulary)
    judged = {key: i for i, key in enumerate(_keys(control, control))}
    for i, key in enumerate(_keys(pool, control)):
        j = judged.get(key)
        if j is not None:
            raise ValueError(
                f"prompt {i} of the pool is prompt {j} of the control set: who is steered by a prompt cannot be judged "
                "by it. Take it out of one of them; ControlSet.split makes disjoint sets"
            )
    return pool


def _keys(prompts: ControlSet, control: ControlSet) -> list[Hashable]:
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
