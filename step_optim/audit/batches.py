"""How a control set is cut into batches: frozen once, since another layout would round differently."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from step_optim.control.control_set import ControlBatches, ControlSet
from step_optim.control.given import IGNORED, GivenBatch

PROMPTS_AT_ONCE = 4
"""Prompts of a micro-batch on a CPU: 0.73 of the time of one padded batch; one by one costs as much as that."""

TOKENS_AT_ONCE = 16384
"""Tokens of a micro-batch on an accelerator, where every batch costs its launches."""

ALL = sys.maxsize
"""How many prompts at once where batches stay whole."""

WORTH_A_FORWARD = {"cpu": 16, "cuda": 4096}
"""Tokens that a shared prefix must spare to be worth a forward of its own: what costs as much as its launches."""


@dataclass(frozen=True)
class Batch:
    """Some prompts of the control set, padded on the right to one length, without the prefix."""

    ids: Tensor
    """[B, T] token ids; the padding is never looked at. Of a given batch the labels."""

    mask: Tensor
    """[B, P + T] 1 where there is a token, the P of the prefix included."""

    positions: Tensor
    """[r] places in the flattened [B T] whose logits predict a response token, or belong to a label."""

    rows: Tensor
    """[r] which response rows of the control set those are."""

    given: GivenBatch | None = None
    """What a processor made, with which the model is called in the place of ids and mask."""


@dataclass(frozen=True)
class Layout:
    """The batches of a control set, sorted by length, and the prefix that all prompts share."""

    prefix: Tensor
    """[1, P] token ids; P = 0 if nothing is shared."""

    batches: tuple[Batch, ...]

    @classmethod
    def of(cls, control: ControlSet, micro_batch: int, prefix: int = 0) -> Layout:
        """Cut off the first ``prefix`` tokens of every prompt, and pad the rest of each micro-batch.

        Batches that were given stay as they are.
        """
        if isinstance(control, ControlBatches):
            return cls(control.batches[0].labels[:1, :0], tuple(_given(control)))
        return cls(control.prompts[0][None, :prefix], tuple(_batches(control, micro_batch, prefix)))


def layouts_of(
    control: ControlSet, prompts: Sequence[int], slices: Sequence[Sequence[int]], at_once: int
) -> Iterator[tuple[Layout, Tensor]]:
    """Cut some prompts into micro-batches that few slices share: each costs one backward pass a slice.

    Returns:
        A layout of each, without a prefix; and the rows of the control set that its rows are.
    """
    first = _first_rows(control)
    ordered = sorted(prompts, key=lambda i: [i in members for members in slices])
    for start in range(0, len(ordered), at_once):
        part = ordered[start : start + at_once]
        rows = [row for i in part for row in range(first[i], first[i + 1])]
        yield Layout.of(control.select(part), len(part)), torch.tensor(rows, device="cpu").to(control.device)


def micro_batch_of(control: ControlSet, wanted: int | None) -> int:
    """Read the argument ``micro_batch=``; None lets the device decide.

    Raises:
        ValueError: less than one prompt; batches that were given.
    """
    if isinstance(control, ControlBatches):
        if wanted is not None:
            raise ValueError(
                f"micro_batch={wanted}: batches are evaluated as they were given; make them of another size, and leave "
                "micro_batch out"
            )
        return ALL
    if wanted is not None:
        if wanted < 1:
            raise ValueError(f"micro_batch={wanted} must be at least 1 prompt")
        return wanted
    if control.device.type == "cpu":
        return PROMPTS_AT_ONCE
    longest = max(len(p) + len(r) for p, r in zip(control.prompts, control.responses, strict=True))
    return max(1, TOKENS_AT_ONCE // longest)


def shared_prefix(control: ControlSet) -> int:
    """How many tokens all prompts begin with; the last prompt token is left out, for it predicts a response."""
    first, *others = (prompt.tolist() for prompt in control.prompts)
    length = len(first) - 1
    for other in others:
        length = min(length, len(other) - 1)
        length = next((i for i in range(length) if other[i] != first[i]), length)
    return length


def worth_sharing(control: ControlSet, prefix: int) -> bool:
    """Whether running the prefix once spares more than it costs."""
    return prefix * (len(control) - 1) >= WORTH_A_FORWARD.get(control.device.type, WORTH_A_FORWARD["cuda"])


def prefix_of(control: ControlSet, wanted: bool | None) -> int:
    """Read the argument ``prefix=``: how many tokens are run once for all; None shares them if it is worth it.

    Raises:
        ValueError: batches that were given.
    """
    if isinstance(control, ControlBatches):
        if wanted:
            raise ValueError("prefix=True: batches are evaluated as they were given, whole; leave prefix out")
        return 0
    shared = shared_prefix(control)
    return shared if wanted or (wanted is None and worth_sharing(control, shared)) else 0


def _batches(control: ControlSet, micro_batch: int, prefix: int) -> Iterator[Batch]:
    first_row = _first_rows(control)
    for members in batch_members(control, micro_batch):
        texts = [torch.cat([control.prompts[i], control.responses[i]]).cpu() for i in members]
        width = max(len(text) for text in texts) - prefix
        ids = torch.zeros(len(members), width, dtype=torch.long, device="cpu")
        mask = torch.zeros(len(members), prefix + width, dtype=torch.long, device="cpu")
        positions: list[int] = []
        rows: list[int] = []
        for place, (i, text) in enumerate(zip(members, texts, strict=True)):
            ids[place, : len(text) - prefix], mask[place, : len(text)] = text[prefix:], 1
            # The logits at position t predict token t + 1.
            start = place * width - prefix
            positions += range(start + len(control.prompts[i]) - 1, start + len(text) - 1)
            rows += range(first_row[i], first_row[i + 1])
        yield _batch(control.device, ids, mask, positions, rows)


def _given(control: ControlBatches) -> Iterator[Batch]:
    first_row = _first_rows(control)
    for members in batch_members(control, ALL):
        batch = control.batches[control.places[members[0]][0]]
        measured = (batch.labels != IGNORED).cpu()
        positions: list[int] = []
        rows: list[int] = []
        for i in members:
            _, row = control.places[i]
            # Shifted logits at position t predict the label at t + 1.
            start = row * measured.shape[1] - bool(control.shift)
            positions += (start + measured[row].nonzero().flatten()).tolist()
            rows += range(first_row[i], first_row[i + 1])
        yield replace(_batch(control.device, batch.labels, measured, positions, rows), given=batch)


def _batch(device: torch.device, ids: Tensor, mask: Tensor, positions: list[int], rows: list[int]) -> Batch:
    where, which = (torch.tensor(part, device="cpu").to(device) for part in (positions, rows))
    return Batch(ids.to(device), mask.to(device), where, which)


def _first_rows(control: ControlSet) -> list[int]:
    """The first response row of each prompt, and behind the last."""
    return [0, *accumulate(len(response) for response in control.responses)]


def batch_members(control: ControlSet, micro_batch: int) -> list[list[int]]:
    """Return the prompts of each micro-batch: sorted by length, longest first, so that batches need little padding.

    Batches that were given stay whole; the largest is the first.
    """
    if isinstance(control, ControlBatches):
        groups: list[list[int]] = [[] for _ in control.batches]
        for i, (number, _) in enumerate(control.places):
            groups[number].append(i)
        sizes = [batch.labels.numel() for batch in control.batches]
        return [groups[number] for number in sorted(range(len(groups)), key=lambda number: -sizes[number])]
    lengths = [len(p) + len(r) for p, r in zip(control.prompts, control.responses, strict=True)]
    order = sorted(range(len(control)), key=lambda i: -lengths[i])
    return [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]


@dataclass(frozen=True)
class Shard:
    """What one process evaluates: whole micro-batches, the same as one process alone would make."""

    control: ControlSet
    """The prompts of this process."""
    members: dict[str, tuple[int, ...]]
    """Prompts of each slice; here a slice may have none."""
    sharded: bool = False
    """Whether there are others."""
    idle: int = 0
    """How many micro-batches more the busiest process has."""

    @classmethod
    def of(cls, control: ControlSet, micro_batch: int, shard: Any) -> Shard:
        """Return this process's part: every n-th micro-batch, which balances the lengths.

        Raises:
            ValueError: there are fewer micro-batches than processes.
        """
        group = None if shard is True else shard
        size = dist.get_world_size(group) if shard and dist.is_available() and dist.is_initialized() else 1
        if size == 1:
            return cls(control, dict(control.slices))
        batches = batch_members(control, micro_batch)
        if len(batches) < size:
            raise ValueError(
                f"shard={shard!r}: the {len(control)} control prompts make {len(batches)} micro-batches of "
                f"{micro_batch}, too few for {size} processes; lower micro_batch, or use shard=False"
                if micro_batch < ALL
                else f"shard={shard!r}: {len(batches)} batches are too few for {size} processes; give smaller ones, or "
                "use shard=False"
            )
        own = batches[dist.get_rank(group) :: size]
        chosen = sorted(i for batch in own for i in batch)
        place = {i: new for new, i in enumerate(chosen)}
        members = {name: tuple(place[i] for i in prompts if i in place) for name, prompts in control.slices.items()}
        return cls(control.select(chosen), members, True, -(-len(batches) // size) - len(own))
