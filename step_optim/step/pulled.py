"""The gradient of the inner step: the loss's, and the share of others that a controller's pull adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from step_optim.host.undo import undone
from step_optim.step.proposal import loss_closure


class Pulled:
    """Adds a direction to `.grad` for the duration of an inner step, as long as a share of the gradient itself.

    Only parameters that have a gradient get one: the others, the inner
    optimizer leaves alone.

    Args:
        shares: by cap, for the record; by default nothing is added.
        parameters: those that may have a gradient.
        parts: shares, and gradients whose length does not matter, a tensor for each parameter.
    """

    def __init__(
        self,
        shares: Mapping[str, float] | None = None,
        parameters: Sequence[Tensor] = (),
        parts: Sequence[tuple[float, Sequence[Tensor]]] = (),
    ) -> None:
        self.shares = dict(shares or {})
        self._direction = _sum(parameters, parts)
        self._own: list[tuple[Tensor, Tensor]] = []
        """Parameters with the gradients that the training loop gave them."""

    @contextmanager
    def during(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Sequence[Any], dict[str, Any]]]:
        """Around the inner step; its arguments, with a loss closure whose gradients are changed, too."""
        with undone(self._take_back):
            closure = loss_closure(args, kwargs)
            if closure is None or not self._direction:
                self._add()
                yield args, kwargs
            elif args:
                yield (self._around(closure), *args[1:]), kwargs
            else:
                yield args, kwargs | {"closure": self._around(closure)}

    def _around(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def loss() -> Any:
            self._take_back()
            value = closure()
            self._add()
            return value

        return loss

    @torch.no_grad()
    def _add(self) -> None:
        found = [(p, p.grad, n) for p, n in self._direction if p.grad is not None]
        if any(g.layout is not torch.strided for _, g, _ in found):
            raise ValueError("a gradient is sparse, and pull=True would make it dense; use Steer(pull=False)")
        length = _length([g for _, g, _ in found])
        if not 0 < length < math.inf:
            return
        self._own = [(p, g) for p, g, _ in found]
        for p, g, n in found:
            p.grad = g.add(n.to(g.dtype), alpha=length)

    def _take_back(self) -> None:
        for p, g in self._own:
            p.grad = g
        self._own = []


def _sum(parameters: Sequence[Tensor], parts: Sequence[tuple[float, Sequence[Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Each parameter, and the sum of its gradients, all of them made as long as their shares."""
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for share, gradient in parts:
        length = _length(gradient)
        if 0 < length < math.inf:
            total = [n.add(part, alpha=share / length) for n, part in zip(total, gradient, strict=True)]
    return list(zip(parameters, total, strict=True)) if parts else []


def _length(parts: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(part)) for part in parts))
