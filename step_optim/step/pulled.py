"""The gradient of the inner step: the loss's, and the share of others that a controller's pull adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from step_optim.controllers.bundle import wide
from step_optim.host.undo import undone
from step_optim.snapshot.tensors import own_part
from step_optim.step.proposal import loss_closure


def norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm of all of them together."""
    return math.hypot(*(float(torch.linalg.vector_norm(wide(tensor))) for tensor in tensors))


class Pulled:
    """Adds a direction to `.grad` for the duration of an inner step, as long as a share of the gradient itself.

    Only parameters that have a gradient get one: the others, the inner
    optimizer leaves alone. What the inner optimizer does to a gradient (clears
    it, say) is done to the training loop's own.

    Args:
        shares: by cap, for the record.
        direction: parameters that the policy reads, and this process's part of what is added to each, for every 1 of
            the length of their gradients.
        length: L2 norm of gradients, over all processes that have parts of them.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        direction: Sequence[tuple[Tensor, Tensor]],
        length: Callable[[Sequence[Tensor]], float] = norm,
    ) -> None:
        self.shares, self._direction, self._length = dict(shares), list(direction), length
        self._given: list[tuple[Tensor, Tensor, Tensor, int]] = []
        """Parameter, the training loop's gradient, the one in its place, and the version of that one's bits."""

    @contextmanager
    def during(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Sequence[Any], dict[str, Any]]]:
        """Around the inner step; its arguments, with a loss closure whose gradients are changed, too."""
        closure = loss_closure(args, kwargs)
        with undone(self._take_back):
            if closure is None:
                self._add()
            elif args:
                args = (self._around(closure), *args[1:])
            else:
                kwargs = kwargs | {"closure": self._around(closure)}
            yield args, kwargs

    def _around(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def loss() -> Any:
            self._take_back()
            value = closure()
            self._add()
            return value

        return loss

    def _add(self) -> None:
        found = [(p, p.grad, n) for p, n in self._direction if p.grad is not None]
        if any(g.layout is not torch.strided for _, g, _ in found):
            raise ValueError("a gradient is sparse, and pull=True would make it dense; use Steer(pull=False)")
        length = self._length([torch.zeros_like(n) if p.grad is None else own_part(p.grad) for p, n in self._direction])
        if not 0 < length < math.inf:
            return
        for p, g, n in found:
            total = _like(g, own_part(g) + (length * n).to(g.dtype))  # with its graph, if second derivatives are wanted
            self._given.append((p, g, total, own_part(total)._version))
            p.grad = total

    @torch.no_grad()
    def _take_back(self) -> None:
        for p, own, total, version in self._given:
            if p.grad is total:
                if own_part(total)._version != version:  # the inner optimizer has written into it
                    own_part(own).copy_(own_part(total))
                p.grad = own
        self._given = []


def _like(gradient: Any, part: Tensor) -> Tensor:
    """A gradient of the same kind, with other values."""
    if not hasattr(gradient, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    shape, stride = gradient.shape, gradient.stride()
    return DTensor.from_local(part, gradient.device_mesh, gradient.placements, shape=shape, stride=stride)
