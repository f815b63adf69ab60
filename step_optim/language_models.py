"""What `TokenKL` has to know about a causal language model: inside what it is wrapped, its head, what it takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from step_optim.control import ControlSet
from step_optim.isolation import has_fsdp


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


def check_audit_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Refuse a dtype that weights cannot be cast to.

    Raises:
        TypeError: it is no floating-point dtype.
        ValueError: FSDP2 owns the model's weights.
    """
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"audit_dtype={dtype!r} is no floating-point dtype; give torch.float32, torch.bfloat16, ...")
    if has_fsdp(model):
        raise ValueError(
            f"audit_dtype={dtype}: FSDP2 gathers the weights itself; choose the dtype with its MixedPrecisionPolicy"
        )


def accepted_arguments(model: nn.Module) -> list[str]:
    """Which of the optional arguments of Hugging Face models this one takes."""
    parameters = inspect.signature(plain(model).forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return [name for name in ("attention_mask", "use_cache", "past_key_values") if takes_any or name in parameters]
