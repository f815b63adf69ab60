"""Gradients of a model that FSDP2 shards: its backward pass reduces them over all processes, into `.grad`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from step_optim.host.modules import sharded
from step_optim.host.undo import undone
from step_optim.snapshot.tensors import own_part


@contextmanager
def set_aside(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Take the training loop's gradients away, and have those of the body reduced; afterwards all is as before.

    Args:
        model: whose backward pass it is.
        parameters: others that may have gradients.
    """
    groups = [group for module in sharded(model.modules()) for group in _groups(module)]
    own = [(p, p.grad) for p in (*model.parameters(), *parameters)]
    ways = [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]

    def put_back() -> None:
        for parameter, gradient in own:
            parameter.grad = gradient
        for group, reduces, all_reduces in ways:
            group.reduce_grads, group.all_reduce_grads = reduces, all_reduces

    with undone(put_back):
        for parameter, _ in own:
            parameter.grad = None
        for group in groups:
            group.reduce_grads = group.all_reduce_grads = True
        yield


def _groups(module: Any) -> list[Any]:
    """What one module has FSDP2 reduce; the attribute's name differs between versions of torch."""
    state = module._get_fsdp_state()
    one = getattr(state, "_fsdp_param_group", None)
    several = getattr(state, "_fsdp_param_groups", None)
    return list(several) if several is not None else [] if one is None else [one]


def shards(parameters: Sequence[Tensor]) -> list[Tensor]:
    """This process's part of each parameter's gradient, as it was reduced; 0 of one that has none."""
    return [torch.zeros_like(own_part(p)) if p.grad is None else own_part(p.grad).detach() for p in parameters]
