"""Which parameters the KL closure does not read: they keep their whole step, whatever becomes of the others'."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from step_optim.audit.closure import KLClosure
from step_optim.audit.noise import AWAY, moved_away
from step_optim.host.ranks import Ranks
from step_optim.movement import Movement
from step_optim.snapshot.entries import CannotKeep
from step_optim.snapshot.known import why_joint
from step_optim.snapshot.snapshot import Snapshot
from step_optim.snapshot.tensors import shard_count
from step_optim.step.auditor import Auditor

KEEP = "unread"

NOISES = (AWAY, AWAY / 10, AWAY / 100)
"""By which part of itself each weight is moved to a generic point, root mean square. LoRA's A is read there, though its
B is 0 at first. The smaller ones are for policies that are none so far away."""

FURTHER = 1.0
"""By which part of itself what seems to be unread is moved from there: it must make no difference."""

NO_POLICY = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What is raised where weights give no policy."""


@dataclass(frozen=True)
class Unread:
    """What is known of the parameters that keep their whole step. It is replaced as a whole, as a step ends or fails.

    Parameters are told by their positions in the optimizer's groups, one after another.
    """

    asked: tuple[int, ...] | None = None
    """Those that were named; None for all that the KL closure does not read."""
    found: tuple[int, ...] | None = None
    """Those that keep their step; None if that has to be measured."""
    names: tuple[str, ...] = ()
    """Their names."""
    read: tuple[int, ...] = ()
    """Those that seemed to be unread once, and were not."""
    source: Any = None
    """What they were measured with; None if a checkpoint told them."""
    warned: bool = False
    """Whether it was warned of such a one."""

    def is_known(self, kl: KLClosure) -> bool:
        """Whether they were measured with this KL closure, or told by a checkpoint."""
        return self.found is not None and (self.source is None or self.source == _source(kl))

    def measured(self, kl: KLClosure, found: Collection[int], names: Sequence[str], read: Collection[int]) -> Unread:
        """Return it with what was found.

        Args:
            kl: measured it.
            found: what is unread, and was so before.
            names: theirs.
            read: what is read. It is part of the policy from now on, whatever other observations say.
        """
        read = tuple(dict.fromkeys([*self.read, *read]))
        return replace(self, found=tuple(found), names=tuple(names), read=read, source=_source(kl))

    def forgotten(self) -> Unread:
        """Return it as before the first step: the KL closure reads something else."""
        return Unread(self.asked)

    def without_model(self) -> Unread:
        """Return it as a checkpoint would tell it."""
        return replace(self, source=None)

    def describe(self) -> dict[str, Any]:
        """For the first line of a log: what was asked for, and the names of what keeps its step, once known."""
        asked = KEEP if self.asked is None else f"{len(self.asked)} parameters"
        known = self.found is not None and len(self.names) == len(self.found)
        return {"asked": asked, "parameters": list(self.names) if known else None}

    def state_dict(self) -> dict[str, list[int] | None]:
        """Plain values, for a checkpoint; nothing before the first measurement."""
        if self.found is None:
            return {}
        asked = None if self.asked is None else list(self.asked)
        return {"asked": asked, "found": list(self.found), "read": list(self.read)}

    def loaded(self, state: Mapping[str, Any] | None) -> Unread:
        """Return it as a checkpoint tells it: one without such an entry says nothing.

        Raises:
            ValueError: it cannot be read.
        """
        if not state or state["asked"] != (None if self.asked is None else list(self.asked)):
            return self.forgotten()
        return Unread(self.asked, _positions(state["found"]), read=_positions(state["read"]))


def _source(kl: KLClosure) -> Any:
    """What is read, on which observations; a function is another closure in every step that it is given to."""
    return (getattr(kl, "fn", kl) if kl.opaque else kl), kl.renewals


def _positions(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise ValueError(f"{value!r:.60} is no list of positions")
    return tuple(value)


def unread_of(keep: Any, optimizer: Optimizer) -> Unread | None:
    """Read the argument ``keep=``: None, ``"unread"``, or parameters of the optimizer.

    Raises:
        TypeError: none of these.
        ValueError: no parameter at all, or one that the optimizer does not have; an optimizer whose state belongs to
            all parameters together, or FSDP2, which has split the weights.
    """
    if keep is None:
        return None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    asked = None if isinstance(keep, str) and keep == KEEP else _asked(keep, parameters)
    if (why := why_joint(optimizer)) is not None:
        raise ValueError(
            f"keep={_shown(keep)}: {type(optimizer).__name__} {why}, so that no part of its state can be kept while "
            "the rest is rolled back. Use keep=None, or an optimizer of their own for the parameters that keep theirs"
        )
    if any(shard_count(p) > 1 for p in parameters):
        raise ValueError(
            f"keep={_shown(keep)}: FSDP2 has split the weights, and what the KL closure reads cannot be measured then; "
            "use keep=None, or DistributedDataParallel"
        )
    return Unread(asked)


def _asked(keep: Any, parameters: Sequence[Tensor]) -> tuple[int, ...]:
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r} is unknown; use 'unread', a list of parameters, or None")
    if isinstance(keep, Tensor) or not isinstance(keep, Iterable):
        raise TypeError(f"keep={_shown(keep)} is no list of parameters; give critic.parameters(), 'unread', or None")
    positions, given = {id(p): i for i, p in enumerate(parameters)}, list(keep)
    for i, each in enumerate(given):
        if not isinstance(each, Tensor):
            raise TypeError(f"keep[{i}]={each!r:.60} is no parameter; give critic.parameters(), say")
        if id(each) not in positions:
            raise ValueError(
                f"keep[{i}], a tensor of shape {tuple(each.shape)}, is no parameter of the optimizer; give those that "
                "are in its param_groups"
            )
    if not given:
        raise ValueError("keep=[] names no parameter; use None to keep nothing, or 'unread'")
    return tuple(dict.fromkeys(positions[id(each)] for each in given))


def _shown(keep: Any) -> str:
    return repr(keep) if isinstance(keep, str) else f"{keep!r:.60}"


def culprits(suspects: Sequence[int], differs: Callable[[Sequence[int]], bool]) -> list[int]:
    """Return which suspects to leave out, so that all others together make no difference.

    Few culprits are found in few questions: about 2 log2(suspects) each.

    Args:
        suspects: what may make a difference.
        differs: whether some of them together make one.

    >>> culprits(range(8), lambda some: 5 in some)
    [5]
    """
    left, found = list(suspects), list[int]()
    while left and differs(left):
        more = _some(left, differs)
        found += more
        left = [each for each in left if each not in more]
    return sorted(found)


def _some(suspects: list[int], differs: Callable[[Sequence[int]], bool]) -> list[int]:
    """Culprits among suspects that make a difference together; where no half does by itself, all of them."""
    half = len(suspects) // 2
    parts = [suspects[:half], suspects[half:]] if half else []
    return [each for part in parts if differs(part) for each in _some(part, differs)] or suspects


class Probe:
    """Finds out which tensors the KL closure reads, by moving them. It leaves the weights anywhere.

    Args:
        auditor: measures.
        snapshot: writes the weights; nothing in it is spared.
        ranks: who has to agree.
    """

    def __init__(self, auditor: Auditor, snapshot: Snapshot, ranks: Ranks) -> None:
        self._auditor, self._snapshot, self._ranks = auditor, snapshot, ranks
        self.count = 0
        """Audits and gradients so far."""

    def reading(self) -> Movement:
        """Measure the weights as they are."""
        self.count += 1
        return self._auditor.audit().movement

    def at(self, values: Sequence[Tensor]) -> Movement:
        """Measure any weights, a tensor for each place in the snapshot."""
        self._snapshot.write(values)
        return self.reading()

    def read_of(
        self, suspects: Sequence[int], start: Sequence[Tensor], before: Movement, moved: Mapping[int, Tensor]
    ) -> list[int]:
        """Return which suspects make a difference if they are moved from a start.

        Args:
            suspects: places in the snapshot.
            start: a tensor for each place.
            before: what it reads.
            moved: other weights of the suspects, by place.
        """

        def differs(some: Sequence[int]) -> bool:
            now = self.at([moved[i] if i in some else each for i, each in enumerate(start)])
            return any(self._ranks.exchange(_figures(now) != _figures(before)))

        return culprits(suspects, differs)

    def unread(self, able: Sequence[int]) -> list[int]:
        """Return the places that the KL closure does not read, of some; none of them where nothing can be measured."""
        generic = self._generic()
        if generic is None:
            return []
        start, before = generic
        flat = self._flat(start)
        suspects = [i for i in able if i in flat]
        further = moved_away([start[i] for i in suspects], FURTHER, seed=1)
        read = self.read_of(suspects, start, before, {i: further[id(start[i])] for i in suspects})
        return [i for i in suspects if i not in read]

    def _generic(self) -> tuple[list[Tensor], Movement] | None:
        """Weights near theta_t at which all that is read makes a difference, and their reading; None if none serve."""
        previous = self._snapshot.previous
        for part in NOISES:
            moved = moved_away([p for p in previous if can_be_moved(p)], part)
            start = [moved.get(id(p), p) for p in previous]
            found = self._if_a_policy(start)
            if found is not None and found.is_finite:
                return start, found
        return None

    def _if_a_policy(self, values: Sequence[Tensor]) -> Movement | None:
        try:
            return self.at(values)
        except NO_POLICY:
            if self._ranks.size > 1:  # the others wait for what this one has measured
                raise
            return None

    def _flat(self, start: Sequence[Tensor]) -> Collection[int]:
        """Places that the movement's graph does not reach; all of them, where there are no gradients.

        A gradient of exactly 0 is not enough: a weight whose inputs are 0 in
        these observations is read in others.
        """
        everywhere = range(len(start))
        if not self._has_gradients:
            return everywhere
        self.count += 1
        reached = set[int]()
        hooks = [
            parameter.register_hook(lambda _, i=i: reached.add(i))  # type: ignore[no-untyped-call]
            for i, parameter in enumerate(self._snapshot.parameters)
            if parameter.requires_grad
        ]
        try:
            (normal,) = self._auditor.normals(["mean"], start)
        except NotImplementedError:  # only some of the function's figures have a graph
            return everywhere
        finally:
            for hook in hooks:
                hook.remove()
        read = (i in reached or bool((part != 0).any()) for i, part in enumerate(normal.gradient))
        flat = [i for i, is_read in enumerate(read) if not is_read]
        return set(self._ranks.agree(flat))

    @property
    def _has_gradients(self) -> bool:
        """Whether the KL closure has some; a plain function that was not written for them may fail, or be warned."""
        if not self._auditor.kl.opaque:
            return self._auditor.kl.has_gradients
        with warnings.catch_warnings(), suppress(RuntimeError, TypeError, ValueError):
            warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad")
            return self._auditor.kl.has_gradients
        return False


def can_be_moved(weight: Tensor) -> bool:
    """Whether noise can tell if it is read: it has numbers, at least one."""
    numbers = weight.is_floating_point() or weight.is_complex()
    return numbers and weight.numel() > 0 and not weight.is_meta


def _figures(movement: Movement) -> str:
    """All figures, so that equal ones are equal bit for bit, NaN too."""
    figures: Iterator[Any] = iter((movement.mean, sorted(movement.slices.items()), movement.prompt, movement.token))
    return repr([*figures, list(movement.prompts or ())])


def warn_of_none(kl: KLClosure) -> None:
    """Say that nothing keeps its step."""
    warnings.warn(
        f"keep=: {kl!r} reads all parameters of the optimizer, as far as can be measured near these weights, so that "
        "none keeps its step. Is the critic in this optimizer? If it is a part of the policy, use keep=None",
        stacklevel=2,
    )


def refuse_read(name: str) -> CannotKeep:
    """Return the error for a parameter that was named, and that the KL closure reads."""
    return CannotKeep(
        f"keep= names {name}, which the KL closure reads: its step moves the policy, and has to be judged with the "
        "rest. Leave it out, or use keep='unread'"
    )
