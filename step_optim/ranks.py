"""Several processes, one policy: every decision is taken on the same figures everywhere, or nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

WORLD = "world"
"""All processes of torch.distributed, if it is initialised when a step begins."""


class PeerFailed(RuntimeError):
    """Another process failed in this step; every process has put its own part back."""

    def __init__(self, message: str, *, fatal: bool) -> None:
        super().__init__(message)
        self.fatal = fatal
        """Whether its error is raised there, rather than turned into a rejection by ``on_error="reject"``."""


@dataclass(frozen=True)
class _Failure:
    message: str
    fatal: bool


class Ranks:
    """The processes that train one policy together.

    A process that decided by itself would move half of the rows under FSDP2
    and make the replicas of DDP diverge, both silently. So whatever a decision
    rests on goes through `exchange`, and a failure that one process has by
    itself reaches the others at their next exchange: nobody waits for ever,
    and nobody commits. A step ends with one more exchange, which commits
    everywhere or nowhere.

    Args:
        process_group: ``"world"``, a ProcessGroup whose backend takes CPU
            objects, or None if this process decides alone.
    """

    def __init__(self, process_group: Any = WORLD) -> None:
        if isinstance(process_group, str) and process_group != WORLD:
            raise ValueError(f"process_group={process_group!r} is unknown; use 'world', a ProcessGroup, or None")
        self._given = process_group
        self._own: Any = None

    def _group(self) -> Any:
        """The group to talk in; None if there is nobody to talk to.

        For the world it is one of our own, over gloo: a message here must
        never be taken for a collective of the model, and costs no
        synchronisation with a device.
        """
        if self._given is None or not dist.is_available() or not dist.is_initialized():
            return None
        if self._given != WORLD:
            return self._given
        if dist.get_world_size() == 1:
            return None
        if self._own is None or self._own[0] is not dist.group.WORLD:  # the world may be made anew
            self._own = (dist.group.WORLD, dist.new_group(backend="gloo"))
        return self._own[1]

    @property
    def size(self) -> int:
        """How many processes there are; 1 without torch.distributed."""
        group = self._group()
        return 1 if group is None else dist.get_world_size(group)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the log."""
        group = self._group()
        return group is None or dist.get_rank(group) == 0

    def exchange(self, value: T) -> list[T]:
        """Give every process's value to every process, in the order of the ranks.

        Raises:
            PeerFailed: a process told of its failure instead.
        """
        group = self._group()
        if group is None:
            return [value]
        heard: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(heard, (None, value), group)
        failures = {rank: failure for rank, (failure, _) in enumerate(heard) if failure is not None}
        if failures:
            raise PeerFailed(
                "; ".join(f"rank {rank}: {failure.message}" for rank, failure in failures.items()),
                fatal=any(failure.fatal for failure in failures.values()),
            )
        return [value for _, value in heard]

    def same(self, value: Any, vote: bool) -> list[bool]:
        """Exchange votes among processes that have the same value.

        Raises:
            ValueError: they have not: their decisions would differ.
        """
        heard = self.exchange((value, vote))
        if any(other != value for other, _ in heard):
            raise ValueError(f"the processes do not agree on their budgets: {[other for other, _ in heard]}")
        return [vote for _, vote in heard]

    def confess(self, error: BaseException, *, fatal: bool) -> None:
        """Tell the others, at their next exchange, what went wrong here; not what they know already.

        Args:
            error: what was raised.
            fatal: whether it is going to be raised out of `step()`, here and so everywhere.
        """
        group = self._group()
        if group is None or isinstance(error, PeerFailed):
            return
        heard: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(heard, (_Failure(f"{type(error).__name__}: {error}", fatal), None), group)

    def agree(self, value: T) -> T:
        """Return the first process's value everywhere: what each has computed by itself may differ in its last bits."""
        return self.exchange(value)[0]

    def average(self, tensors: Sequence[Tensor], weight: float) -> list[Tensor]:
        """Return the weighted mean of all processes' tensors, the same bits everywhere."""
        group = self._group()
        if group is None:
            return list(tensors)
        total = sum(self.exchange(weight))
        means = []
        for tensor in tensors:
            wide = (tensor * (weight / total)).cpu()
            dist.all_reduce(torch.view_as_real(wide) if wide.is_complex() else wide, group=group)
            means.append(wide.to(tensor.device, tensor.dtype))
        return means

    def __deepcopy__(self, memo: Any) -> Ranks:
        """The same processes; a group is not a value that can be copied."""
        return Ranks(self._given)

    def __reduce__(self) -> Any:
        """A pickle knows only the world."""
        return Ranks, (None if self._given is None else WORLD,)
