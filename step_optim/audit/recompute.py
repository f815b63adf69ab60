"""Less memory for the gradients of constraints: of each layer its input is kept, the rest is computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from step_optim.host.undo import undone

TOLERANCE = 1e-2
"""Largest relative difference of gradients that counts as rounding, in narrow numbers too."""

FEWER_AT_ONCE = 4
"""By how much a micro-batch is smaller then: what a layer makes in a backward pass is more than in an audit."""


def checkpoints(model: nn.Module) -> bool:
    """Whether a model does so itself while it trains: `gradient_checkpointing_enable()` of transformers."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def checked_recompute(model: nn.Module, recompute: bool | None) -> bool | None:
    """Read the argument ``recompute=``.

    Raises:
        TypeError: it is none of True, False and None.
        ValueError: it is True, and the model has no layers.
    """
    if not isinstance(recompute, (bool, type(None))):
        raise TypeError(f"recompute={recompute!r} is none of True, False, and None (as the model does in training)")
    if recompute and next(layers_of(model), None) is None:
        raise ValueError(
            f"recompute=True: {type(model).__name__} has no nn.ModuleList whose layers could be computed again; leave "
            "recompute out"
        )
    return recompute


def layers_of(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of the outermost `nn.ModuleList`s, which is where models have their layers."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from layers_of(child)


def check_recomputed(model: nn.Module, read: Callable[[], Tensor], weights: Sequence[Tensor]) -> None:
    """Refuse a model whose layers compute something else the second time: those that keep a state.

    Args:
        model: has the layers.
        read: a forward of it.
        weights: that are trained.

    Raises:
        ValueError: gradients differ by more than rounding, or a layer overwrites what it was given.
    """

    def gradients() -> list[Tensor]:
        found = torch.autograd.grad(read().float().square().mean(), weights, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    plain = gradients()
    try:
        with recomputed(model):
            again = gradients()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"recompute=True: layers of {type(model).__name__} cannot run again in the backward pass ({error}); leave "
            "recompute out"
        ) from error
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(plain, again, strict=True))
    size = sum(float(a.double().square().sum()) for a in plain)
    if off > TOLERANCE**2 * size:
        raise ValueError(
            f"recompute=True: layers of {type(model).__name__} compute something else when they run again (they keep "
            "a state, or draw random numbers), so gradients would be wrong; leave recompute out"
        )


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Let every layer of a model keep its input alone for a backward pass, and compute the rest in it again.

    The backward pass has to run inside the same audit as the forward: what a
    layer computes again has to be what it computed at first.

    Raises:
        RuntimeError: in the backward pass, if a layer overwrote a tensor that it was given.
    """
    forwards = {layer: vars(layer).get("forward") for layer in dict.fromkeys(layers_of(model))}

    def restore() -> None:
        for layer, own in forwards.items():
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own

    with undone(restore):
        for layer in forwards:
            layer.forward = _twice(layer.forward)
        yield


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward that keeps its arguments only."""

    def run(*args: Any, **options: Any) -> Any:
        def again(*given: Any) -> Any:
            return forward(*given[: len(args)], **dict(zip(options, given[len(args) :], strict=True)))

        # All of them by position: torch saves those, and refuses to go on if one was overwritten.
        return checkpoint(again, *args, *options.values(), use_reentrant=False, preserve_rng_state=False)

    return run
