"""What an optimizer keeps of some parameters alone: it can stay as it is where all else is rolled back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from step_optim.snapshot.store import TensorStore
from step_optim.snapshot.tensors import memory
from step_optim.snapshot.walk import Walk, refill


class CannotKeep(ValueError):
    """Some parameters were to keep their whole step, and cannot: their state, or the policy, is not theirs alone."""


class Entries:
    """What the optimizer's state says under some parameters, as it is now, and which groups are theirs alone.

    Every dictionary that is reachable from the optimizer and has parameters as
    keys counts: wrappers keep such a one in the optimizer inside them.

    Args:
        optimizer: whose state it is.
        parameters: the objects in its groups.
        host: keep the copies of a CUDA device's tensors in pinned host memory.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], *, host: bool = False) -> None:
        self._optimizer, self._own = optimizer, {id(p) for p in parameters}
        self._apart = _Apart(optimizer)
        """All that belongs to no parameter alone."""
        entries = list(self._apart.entries())
        self._entries = [(held, key, value) for held, key, value in entries if id(key) in self._own]
        self._inside = Walk(optimizer, [value for _, _, value in self._entries])
        self._others = Walk(optimizer, [value for _, key, value in entries if id(key) not in self._own])
        self._tensors = TensorStore(host=host)
        self._tensors.capture(self._inside.tensors)
        self.groups = {
            id(group)
            for group in optimizer.param_groups
            if group["params"] and all(id(p) in self._own for p in group["params"])
        }

    @torch.no_grad()
    def put_back(self) -> None:
        """Let the optimizer have these entries again, bit for bit; tensors and containers are the same objects."""
        for held, key, value in self._entries:
            held[key] = value
        for undo in self._inside.undo:
            undo()
        self._tensors.restore()

    def check(
        self, before: TensorStore, held: dict[int, tuple[Any, Any]], written: Collection[tuple[dict[str, Any], str]]
    ) -> None:
        """Refuse what a step has changed for these parameters and others together.

        Args:
            before: all tensors at theta_t.
            held: the members of all containers at theta_t, by the containers' ids; see `Walk.held`.
            written: the group values that the inner step wrote: (group, key).

        Raises:
            CannotKeep: it names the value, and what helps.
        """
        self._check_groups(written)
        shared = next(self._numbers(held), None)
        if shared is None and any(_changed(tensor, before) for tensor in self._common()):
            shared = "a tensor in its state"
        if shared is not None:
            raise CannotKeep(
                f"{type(self._optimizer).__name__} keeps {shared} for all parameters together: it cannot be rolled "
                "back for some of them alone. Use keep=None, or an optimizer of their own for the parameters that keep "
                "their step"
            )

    def _check_groups(self, written: Collection[tuple[dict[str, Any], str]]) -> None:
        for group, key in written:
            if id(group) not in self.groups and any(id(p) in self._own for p in group["params"]):
                number = next(i for i, each in enumerate(self._optimizer.param_groups) if each is group)
                raise CannotKeep(
                    f"param_groups[{number}] has parameters that keep their whole step and others, and "
                    f"{type(self._optimizer).__name__} writes one {key!r} for all of them; give the parameters that "
                    "keep their step a group of their own"
                )

    def _common(self) -> Iterator[Tensor]:
        """The tensors that are no parameter's alone."""
        yield from self._apart.tensors
        others = {memory(tensor) for tensor in self._others.tensors}
        yield from (tensor for tensor in self._inside.tensors if memory(tensor) in others)

    def _numbers(self, before: dict[int, tuple[Any, Any]]) -> Iterator[str]:
        """Name the numbers that are no parameter's alone and have changed."""
        for place, (_, now) in self._apart.held.items():
            _, then = before.get(place, (None, None))
            if isinstance(now, dict) and isinstance(then, dict):
                yield from (repr(key) for key, value in now.items() if _is_number(value) and then.get(key) != value)
            elif isinstance(now, list) and [*filter(_is_number, now)] != [*filter(_is_number, then or ())]:
                yield "a list of numbers"


class _Apart(Walk):
    """The way through an optimizer that leaves out what dictionaries have under parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._by_parameter: list[dict[Any, Any]] = []
        super().__init__(optimizer)

    def entries(self) -> Iterator[tuple[dict[Any, Any], Tensor, Any]]:
        """Yield (dictionary, parameter, what it has under it)."""
        for held in self._by_parameter:
            yield from ((held, key, value) for key, value in held.items() if id(key) in self._parameters)

    def _container(self, item: Any) -> None:
        if not isinstance(item, dict) or not any(id(key) in self._parameters for key in item):
            super()._container(item)
            return
        self._by_parameter.append(item)
        members = {key: value for key, value in item.items() if id(key) not in self._parameters}
        self._visit_all(members.values())
        self.undo.append(partial(refill, item, members))  # for `held` alone: this walk only looks


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _changed(tensor: Tensor, before: TensorStore) -> bool:
    copy = before.copy_of(tensor)
    return copy is None or not copy.unchanged
