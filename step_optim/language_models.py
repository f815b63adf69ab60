"""What `TokenKL` has to know about a causal language model: inside what it is wrapped, its head, what it takes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from step_optim.control import ControlSet


def plain(model: nn.Module) -> Any:
    """The module inside `torch.compile` and DistributedDataParallel.

    The forward of the latter synchronises buffers, and not every process is in it.
    """
    inside = {"DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
    while type(model).__name__ in inside:
        model = getattr(model, inside[type(model).__name__])
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and the like, which do not pass on its accessors."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "get_output_embeddings") else model


def output_head(model: nn.Module) -> Any:
    """The module that makes logits, if the model tells; None otherwise."""
    find = getattr(unwrapped(model), "get_output_embeddings", None)
    return None if find is None else find()


def vocab_size_of(model: nn.Module) -> int | None:
    """How many tokens the model knows, if it tells; None otherwise."""
    find = getattr(unwrapped(model), "get_input_embeddings", None)
    size = getattr(None if find is None else find(), "num_embeddings", None)
    return size if isinstance(size, int) else None


def check_device(model: nn.Module, control: ControlSet) -> None:
    """Refuse a control set on another device than the model's.

    Raises:
        ValueError: it is.
    """
    device = next((p.device for p in model.parameters()), control.device)
    if device != control.device:
        raise ValueError(
            f"the control set is on {control.device}, the model on {device}; use control.to({str(device)!r})"
        )


def accepted_arguments(model: nn.Module) -> list[str]:
    """Which of the optional arguments of Hugging Face models this one takes."""
    parameters = inspect.signature(plain(model).forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return [name for name in ("attention_mask", "use_cache") if takes_any or name in parameters]
