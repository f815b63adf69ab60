"""How a control set is cut into batches: frozen once, since another layout would round differently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from step_optim.control.control_set import ControlSet

PROMPTS_AT_ONCE = 4
"""Prompts of a micro-batch on a CPU: 0.73 of the time of one padded batch; one by one costs as much as that."""

TOKENS_AT_ONCE = 16384
"""Tokens of a micro-batch on an accelerator, where every batch costs its launches."""

WORTH_A_FORWARD = {"cpu": 16, "cuda": 4096}
"""Tokens that a shared prefix must spare to be worth a forward of its own: what costs as much as its launches."""


@dataclass(frozen=True)
class Batch:
    """Some prompts of the control set, padded on the right to one length, without the prefix."""

    ids: Tensor
    """[B, T] token ids; the padding is never looked at."""

    mask: Tensor
    """[B, P + T] 1 where there is a token, the P of the prefix included."""

    positions: Tensor
    """[r] places in the flattened [B T] whose logits predict a response token."""

    rows: Tensor
    """[r] which response rows of the control set those are."""


@dataclass(frozen=True)
class Layout:
    """The batches of a control set, sorted by length, and the prefix that all prompts share."""

    prefix: Tensor
    """[1, P] token ids; P = 0 if nothing is shared."""

    batches: tuple[Batch, ...]

    @classmethod
    def of(cls, control: ControlSet, micro_batch: int, prefix: int = 0) -> Layout:
        """Cut off the first ``prefix`` tokens of every prompt, and pad the rest of each micro-batch."""
        return cls(control.prompts[0][None, :prefix], tuple(_batches(control, micro_batch, prefix)))


def micro_batch_of(control: ControlSet, wanted: int | None) -> int:
    """Read the argument ``micro_batch=``; None lets the device decide.

    Raises:
        ValueError: less than one prompt.
    """
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
    """Read the argument ``prefix=``: how many tokens are run once for all; None shares them if it is worth it."""
    shared = shared_prefix(control)
    return shared if wanted or (wanted is None and worth_sharing(control, shared)) else 0


def _batches(control: ControlSet, micro_batch: int, prefix: int) -> Iterator[Batch]:
    first_row = [0]
    for response in control.responses:
        first_row.append(first_row[-1] + len(response))
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
        yield Batch(
            *(
                part.to(control.device)
                for part in (ids, mask, torch.tensor(positions, device="cpu"), torch.tensor(rows, device="cpu"))
            )
        )


def batch_members(control: ControlSet, micro_batch: int) -> list[list[int]]:
    """Return the prompts of each micro-batch: sorted by length, longest first, so that batches need little padding."""
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
            )
        own = batches[dist.get_rank(group) :: size]
        chosen = sorted(i for batch in own for i in batch)
        place = {i: new for new, i in enumerate(chosen)}
        members = {name: tuple(place[i] for i in prompts if i in place) for name, prompts in control.slices.items()}
        return cls(control.select(chosen), members, True, -(-len(batches) // size) - len(own))
