"""Which part of a control set each process evaluates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from step_optim.control.control_set import ControlSet


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
    spare: int = 0
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
