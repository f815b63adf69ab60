"""Several processes, one policy: every decision is taken on the same figures everywhere, or nowhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.nn.parallel import DistributedDataParallel

from step_optim.host.undo import inserted
from step_optim.host.watchdog import WATCHDOG

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


@dataclass(frozen=True)
class _Entering:
    """Sent before a forward that needs all processes; it answers to no other message."""


class Ranks:
    """The processes that train one policy together.

    A process that decided by itself would move half of the rows under FSDP2
    and make the replicas of DDP diverge, both silently. So whatever a decision
    rests on goes through `exchange`, and a failure that one process has by
    itself reaches the others at their next exchange: nobody waits for ever,
    and nobody commits. A step ends with one more exchange, which commits
    everywhere or nowhere. One that waits for long says so (`watchdog`).

    Args:
        process_group: ``"world"``, a ProcessGroup whose backend takes CPU
            objects, or None if this process decides alone.
    """

    def __init__(self, process_group: Any = WORLD) -> None:
        if isinstance(process_group, str) and process_group != WORLD:
            raise ValueError(f"process_group={process_group!r} is unknown; use 'world', a ProcessGroup, or None")
        self._given = process_group
        self._own: Any = None
        self._failed: PeerFailed | None = None
        """A failure that all processes know of; this step cannot go on."""

    def begin(self) -> None:
        """Begin a new step: an earlier failure is over."""
        self._failed = None

    @property
    def failed(self) -> bool:
        """Whether all processes know of a failure with which this step cannot go on."""
        return self._failed is not None

    def recover(self) -> None:
        """Go on all the same: nothing that is decided has to do with the failure that all processes know of."""
        self._failed = None

    def _members(self) -> Any:
        """The group of all members, whatever its backend; None if there are no others."""
        if self._given is None or not dist.is_available() or not dist.is_initialized():
            return None
        group = dist.group.WORLD if self._given == WORLD else self._given
        return None if dist.get_world_size(group) == 1 else group

    def _group(self) -> Any:
        """The group to talk in; None if there is nobody to talk to.

        For the world it is one of our own, over gloo: a message here must
        never be taken for a collective of the model, and costs no
        synchronisation with a device.
        """
        members = self._members()
        if members is None or self._given != WORLD:
            return members
        if self._own is None or self._own[0] is not members:  # the world may be made anew
            with self._waiting("making the group that all processes talk in"):
                self._own = (members, dist.new_group(backend="gloo"))
        return self._own[1]

    @staticmethod
    def _waiting(doing: str) -> AbstractContextManager[None]:
        return WATCHDOG.waiting(f"rank {dist.get_rank()}, {doing},")

    @property
    def size(self) -> int:
        """How many processes there are; 1 without torch.distributed."""
        group = self._members()
        return 1 if group is None else dist.get_world_size(group)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the log. It can be asked without the others."""
        return self.rank == 0

    @property
    def rank(self) -> int:
        """The number of this process among them, from 0 on. It can be asked without the others."""
        group = self._members()
        return 0 if group is None else dist.get_rank(group)

    def exchange(self, value: T) -> list[T]:
        """Give every process's value to every process, in the order of the ranks.

        Raises:
            PeerFailed: a process told of its failure instead.
        """
        if self._group() is None:
            return [value]
        while True:
            heard = self._hear(value)
            if not any(
                isinstance(message, _Entering) for message in heard
            ):  # those that enter one are still on their way
                return heard

    def _hear(self, message: Any) -> list[Any]:
        if self._failed is not None:  # somebody has swallowed it; nobody listens any more
            raise self._failed
        group = self._group()
        heard: list[Any] = [None] * dist.get_world_size(group)
        with self._waiting("exchanging what each process has measured"):
            dist.all_gather_object(heard, message, group)
        failures = {rank: failure for rank, failure in enumerate(heard) if isinstance(failure, _Failure)}
        if failures:
            self._failed = PeerFailed(
                "; ".join(f"rank {rank}: {failure.message}" for rank, failure in failures.items()),
                fatal=any(failure.fatal for failure in failures.values()),
            )
            raise self._failed
        return heard

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run forwards in which modules talk: FSDP2's gather weights, those of DDP broadcast buffers.

        A failed rank never joins a collective. So each announces one before it
        enters such a module: a rank that hears of a failure stays out, where it
        would wait for ever.

        Raises:
            PeerFailed: in the forward.
        """
        if self._group() is None:
            yield
            return
        fsdp = sys.modules.get("torch.distributed.fsdp")
        talkative = (DistributedDataParallel,) if fsdp is None else (DistributedDataParallel, fsdp.FSDPModule)

        def announce(module: nn.Module, _inputs: Any) -> None:
            if isinstance(module, talkative):
                self._hear(_Entering())

        with inserted(
            announce, _global_forward_pre_hooks
        ):  # left behind, it would make training forwards announce themselves
            yield

    def same(self, value: Any, vote: T) -> list[T]:
        """Exchange votes among processes that have the same value.

        Raises:
            ValueError: they have not: their decisions would differ.
        """
        heard = self.exchange((value, vote))
        if any(other != value for other, _ in heard):
            raise ValueError(f"the processes do not agree on their budgets: {[other for other, _ in heard]}")
        return [vote for _, vote in heard]

    def announce_failure(self, error: BaseException, *, fatal: bool) -> None:
        """Tell the others, at their next exchange, what went wrong here; not what they know already.

        Args:
            error: what was raised.
            fatal: whether it is going to be raised out of `step()`, here and so everywhere.
        """
        if self._group() is None:
            return
        with suppress(PeerFailed):  # they know of one already; or hear of this one, and perhaps of others
            self._hear(_Failure(f"{type(error).__name__}: {error}", fatal))

    def agree(self, value: T) -> T:
        """Return the first process's value everywhere: what each has computed by itself may differ in its last bits."""
        return self.exchange(value)[0]

    def average(self, tensors: Sequence[Tensor], weight: float) -> list[Tensor]:
        """Return the weighted mean of all processes' tensors, the same bits everywhere."""
        group = self._group()
        if group is None:
            return list(tensors)
        total = sum(self.exchange(weight))
        parts = [(tensor * (weight / total)).cpu() for tensor in tensors]
        self.exchange(None)  # all have come so far; nobody can tell of a failure in between the following
        for part in parts:
            with self._waiting("averaging"):
                dist.all_reduce(torch.view_as_real(part) if part.is_complex() else part, group=group)
        return [part.to(tensor.device) for part, tensor in zip(parts, tensors, strict=True)]

    def __deepcopy__(self, memo: Any) -> Ranks:
        """The same processes; a group is not a value that can be copied."""
        return Ranks(self._given)

    def __reduce__(self) -> Any:
        """A pickle knows only the world."""
        return Ranks, (None if self._given is None else WORLD,)
