"""What `TokenKL` has to know about a causal language model: inside what it is wrapped, its head, what it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from step_optim.control.control_set import ControlSet
from step_optim.host.modules import has_fsdp, plain, unwrapped

SUMS_TO_ONE = 0.02
"""How far rows of probabilities may be from adding up to 1: 16-bit ones are by 1 %."""


def output_head(model: nn.Module) -> Any:
    """The module that makes logits, if the model tells; None otherwise."""
    return _embeddings(model, "get_output_embeddings")


def _embeddings(model: nn.Module, accessor: str) -> Any:
    find = getattr(unwrapped(model), accessor, None)
    try:
        return None if find is None else find()
    except (NotImplementedError, AttributeError):  # an accessor that every model inherits, and this one cannot answer
        return None


def vocab_size_of(model: nn.Module) -> int | None:
    """How many tokens the model knows, if it tells; None otherwise."""
    size = getattr(_embeddings(model, "get_input_embeddings"), "num_embeddings", None)
    return size if isinstance(size, int) else None


def check_model(model: Any) -> None:
    """Refuse what is no module.

    Raises:
        TypeError: it is a name, a function, ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={model!r:.60} is no torch.nn.Module; load the model first (AutoModelForCausalLM.from_pretrained), "
            "or use PolicyKL for a function"
        )


def check_logits(logits: Tensor) -> None:
    """Refuse probabilities, which softmax would make nearly uniform.

    Args:
        logits: rows [r, V] of a model.

    Raises:
        ValueError: they are numbers from 0 to 1 that add up to 1, in every row.
    """
    rows = logits.float()
    total = rows.sum(-1)
    if bool(((rows >= 0).all(-1) & ((total - 1).abs() < SUMS_TO_ONE)).all()):
        raise ValueError(
            "the model returned probabilities, which add up to 1 in every row; TokenKL needs logits: return them "
            "before the softmax, or their logarithms"
        )


def check_causal(model: nn.Module) -> None:
    """Refuse a model that says itself that it is no causal language model.

    Raises:
        ValueError: an encoder-decoder.
    """
    if getattr(getattr(unwrapped(plain(model)), "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, and a control set of prompts and responses is one sequence "
            "each, for causal language models. Give it the batches that it takes: ControlSet.from_batches"
        )


def check_shapes_known(model: nn.Module) -> None:
    """Refuse weights that do not exist before the first forward.

    Raises:
        ValueError: there are some.
    """
    lazy = next((name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)), None)
    if lazy is not None:
        raise ValueError(f"the parameter {lazy!r} gets its shape in the first forward; run one before TokenKL is made")


def logits_of(out: Any, ids: Tensor) -> Tensor:
    """The logits [B, T, V] in what a model returned for ids [B, T].

    A tensor, an object or mapping with ``logits``, or the first tensor [B, T, ...] of a tuple. A model may put tokens
    of its own before the given ones (prompt tuning), so T may be larger.

    Raises:
        ValueError: there are none; fewer positions than tokens; one token to choose from.
    """
    logits = found_logits(out, len(ids))
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(out).__name__} without logits; TokenKL needs a causal language model (with its "
            "head: AutoModelForCausalLM), whose forward returns logits [batch, tokens, vocabulary], an object with "
            ".logits, or a tuple that begins with them"
        )
    if logits.dim() != 3 or len(logits) != len(ids):
        raise ValueError(
            f"the model returned logits of shape {tuple(logits.shape)} for token ids {tuple(ids.shape)}; TokenKL needs "
            "a causal language model, [batch, tokens, vocabulary]. For a classifier use PolicyKL(lambda: logits [N, A])"
        )
    if logits.shape[1] < ids.shape[1]:
        raise ValueError(
            f"the model returned logits of {logits.shape[1]} of {ids.shape[1]} positions; TokenKL needs those of every "
            "token: wrap the model in a module whose forward returns all of them"
        )
    if logits.shape[2] == 1:
        raise ValueError(
            "the model returned one logit a token, as reward models do: with one token to choose from there is one "
            "policy, and every movement would read 0. Pass the model that generates"
        )
    return logits


def found_logits(out: Any, rows: int) -> Any:
    """What may be the logits in what a model returned for ``rows`` sequences."""
    logits = getattr(out, "logits", out)
    if isinstance(out, Mapping) and "logits" in out:
        logits = out["logits"]
    if isinstance(logits, (tuple, list)):
        fitting = (part for part in logits if isinstance(part, Tensor) and part.dim() == 3)
        logits = next((part for part in fitting if part.shape[0] == rows), logits)
    return logits


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


def check_known(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """Refuse parameters that the model does not have.

    Raises:
        ValueError: there are some.
    """
    known = {id(p) for p in model.parameters()}
    unknown = [tuple(p.shape) for p in parameters if id(p) not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the optimizer's {len(parameters)} parameters are not parameters of the model in "
            f"TokenKL (shapes {unknown[:3]}{'...' if len(unknown) > 3 else ''}); pass the model that they "
            "belong to, or TokenKL(..., check_parameters=False) if the policy does not read them (a value head)"
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
