"""Copies of the weights in an optimizer's state: left at the candidate, they bring a rejected movement back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from step_optim.snapshot.known import ParamLike
from step_optim.snapshot.state import OptimizerState
from step_optim.snapshot.tensors import plain_tensors
from step_optim.snapshot.weights import Weights


class Copies:
    """Moves the copies of the weights to where the weights are moved.

    Args:
        optimizer: whose state they are in.
        weights: the weights between theta_t and the candidate.
        state: knows the bits that the copies had at theta_t.
        param_like: where they are.
    """

    def __init__(self, optimizer: Optimizer, weights: Weights, state: OptimizerState, param_like: ParamLike) -> None:
        self._optimizer, self._weights, self._state = optimizer, weights, state
        self._find = param_like if callable(param_like) else None
        self._keys = () if callable(param_like) else (param_like,) if isinstance(param_like, str) else tuple(param_like)
        self._before: dict[Any, Tensor] = {}
        self._copies: list[_Copy] = []
        self._has_candidate = False

    def mark(self) -> None:
        """Note which copies there are at theta_t; `OptimizerState` has their bits."""
        self._copies, self._has_candidate = [], False
        self._before = {place: copy for place, copy, _ in self._pairs()}

    @torch.no_grad()
    def keep_candidate(self) -> None:
        """Remember what the inner step made of them, once; one that it has created began as a copy of theta_t."""
        if self._has_candidate:
            return
        self._has_candidate = True
        for place, copy, parameter in self._pairs():
            where = self._weights.place_of(parameter)
            weight, previous, candidate = self._weights.of(where)
            old = self._before.get(place)
            saved = None if old is None else self._state.saved(old)
            origin = previous if saved is None else saved
            self._copies.append(_Copy(copy, origin.to(copy.dtype), copy.clone(), weight, candidate, where))

    def _pairs(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Where a copy is found, the copy, its parameter: plain tensors both."""
        for name, copy, parameter in self._named():
            for part, (a, b) in enumerate(zip(plain_tensors(copy), plain_tensors(parameter), strict=True)):
                yield (id(parameter), name, part), a, b

    def _named(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        if self._find is not None:
            seen: Counter[int] = Counter()  # a copy keeps its number when one of another parameter is created
            for copy, parameter in self._find(self._optimizer):
                yield seen[id(parameter)], copy, parameter
                seen[id(parameter)] += 1
            return
        for parameter in (p for group in self._optimizer.param_groups for p in group["params"]):
            state = self._optimizer.state.get(parameter, {})
            for key in self._keys:
                if isinstance(state.get(key), Tensor):
                    yield key, state[key], parameter

    @torch.no_grad()
    def go(self, parts: float | Sequence[float]) -> None:
        """Follow the weights to theta_t + part (candidate - theta_t); see `Weights.go`."""
        spared = self._weights.spared
        for copy in self._copies:
            part = parts if isinstance(parts, (int, float)) else parts[copy.place]
            copy.go(1 if copy.place in spared else part)

    @property
    def round_weights(self) -> bool:
        """Whether a weight is nothing but such a copy in a narrower dtype; known with the candidate."""
        return any(copy.is_master for copy in self._copies)

    @torch.no_grad()
    def follow(self) -> None:
        """Follow the weights to where they are now, off that line."""
        spared = self._weights.spared
        for copy in self._copies:
            if copy.place in spared:
                copy.go(1)
            else:
                copy.follow()


@dataclass
class _Copy:
    """One copy of a weight, and both at the candidate."""

    live: Tensor
    previous: Tensor
    candidate: Tensor
    weight: Tensor
    weight_candidate: Tensor
    place: int
    """Of the weight among all of them."""

    @property
    def is_master(self) -> bool:
        """Whether the weight is nothing but this copy in a narrower dtype."""
        return self.live.element_size() > self.weight.element_size()

    def go(self, part: float) -> None:
        if part in (0, 1):
            self.live.copy_(self.candidate if part == 1 else self.previous)
            return
        self.live.copy_(torch.lerp(self.previous, self.candidate, part))
        if self.is_master:
            self.weight.copy_(self.live)

    def follow(self) -> None:
        if self.is_master:
            self.live.copy_(self.weight)
        else:
            self.live.copy_(self.candidate + (self.weight - self.weight_candidate))
