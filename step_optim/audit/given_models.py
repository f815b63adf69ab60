"""What `TokenKL` has to know about a model that reads batches: where its labels belong, and what its decoder reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from step_optim.audit.language_models import check_causal, check_shapes_known, found_logits, vocab_size_of
from step_optim.control.control_set import ControlBatches, ControlSet
from step_optim.control.given import IGNORED
from step_optim.host.modules import plain, unwrapped

NEXT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Endings of class names whose logits at a position predict the next token, unless they are encoder-decoders."""

SAME = ("ForMaskedLM", "ForTokenClassification")
"""Endings of those whose logits belong to the position itself."""


def as_read_by(model: nn.Module, control: ControlSet) -> ControlSet:
    """Return a control set as one model reads it.

    Raises:
        ValueError: token ids outside the vocabulary; of prompts and responses, that the model is an encoder-decoder; of
            batches, that it cannot be told which logits belong to a label, or what the decoder reads, or that the
            labels do not fit.
    """
    if not isinstance(control, ControlBatches):
        check_causal(model)
    check_shapes_known(model)
    size = vocab_size_of(model)
    if size is not None:
        control.check_vocabulary(size)
    return _resolved(model, control) if isinstance(control, ControlBatches) else control


def _resolved(model: nn.Module, control: ControlBatches) -> ControlBatches:
    inside = _innermost(model)
    coder = bool(getattr(getattr(inside, "config", None), "is_encoder_decoder", False))
    shift = _shift(model, control.shift, coder=coder)
    missing = [
        coder and not {"decoder_input_ids", "decoder_inputs_embeds"} & {*each.inputs} for each in control.batches
    ]
    if shift and any(missing):
        raise ValueError(
            f"shift=True: the decoder inputs of {type(inside).__name__} are made of the labels, one position later, so "
            "that its logits at t belong to label t; leave shift out"
        )
    pairs = zip(missing, control.batches, strict=True)
    made = [decoder_inputs(inside, batch.labels) if absent else None for absent, batch in pairs]
    control = control.resolved(shift, made, aligned=not coder)
    size = vocab_size_of(inside.get_decoder()) if coder and hasattr(inside, "get_decoder") else None
    if size is not None:
        control.check_vocabulary(size, name="decoder_input_ids")
    return control


def _shift(model: nn.Module, asked: bool | None, *, coder: bool) -> bool:
    """Whether the logits at t predict the label at t + 1."""
    if asked is not None:
        return asked
    if coder:
        return False
    names = [kind.__name__ for inside in reversed(list(_inside(model))) for kind in type(inside).__mro__]
    for name in names:
        if name.endswith(NEXT + SAME):
            return name.endswith(NEXT)
    raise ValueError(
        f"{type(model).__name__} does not say which logits belong to a label: give ControlSet.from_batches(..., "
        "shift=True) if those at position t predict the label at t + 1 (decoder-only models), shift=False if they "
        "belong to the label at t (masked language models, token classifiers)"
    )


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What an encoder-decoder makes its decoder read where it is given labels alone, [B, T].

    Raises:
        ValueError: it does not tell.
    """
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is not None:
        with torch.no_grad():
            made: Tensor = make(labels=labels.clone())
        return made
    config = getattr(model, "config", None)
    start, padding = (getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or padding is None:
        raise ValueError(
            f"{type(model).__name__} does not say how its decoder inputs are made of labels; give decoder_input_ids in "
            "the batches"
        )
    # As Whisper, M2M100, Blenderbot do in their forward.
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, padding)


def logits_beside(out: Any, labels: Tensor) -> Tensor:
    """The logits [B, T, V] in what a model returned for labels [B, T].

    Raises:
        ValueError: there are none; other positions than those of the labels; one class.
    """
    logits = found_logits(out, len(labels))
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model returned {type(out).__name__} without logits; load it with its head (AutoModelForSeq2SeqLM, "
            "AutoModelForMaskedLM, AutoModelForTokenClassification, ...)"
        )
    if logits.dim() != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"the model returned logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}; "
            "logits [B, T, classes] are needed, one row for each label"
        )
    if logits.shape[2] == 1:
        raise ValueError(
            "the model returned one logit a position: with one class to choose from there is one policy, and every "
            "movement would read 0. Give a model with two classes or more"
        )
    return logits


def _innermost(model: nn.Module) -> Any:
    return list(_inside(model))[-1]


def _inside(model: nn.Module) -> Iterator[nn.Module]:
    """A model, and what it wraps: compiled, replicated, with adapters."""
    seen: set[int] = set()
    while id(model) not in seen:
        seen.add(id(model))
        yield model
        model = unwrapped(plain(model))
        base = getattr(model, "get_base_model", None)  # PEFT's
        model = base() if callable(base) else model
