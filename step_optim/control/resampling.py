"""Fresh responses, drawn from the current policy and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from step_optim.control.ids import check_vocabulary
from step_optim.control.listing import shown
from step_optim.control.progress import Progress, reported
from step_optim.host.undo import undone
from step_optim.isolation.eval_mode import isolated

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
"""What stays of a model's own generation config: its special tokens, and whether it can go on from a cache."""


def draw_responses(
    model: Any,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int,
    progress: Progress = None,
    **options: Any,
) -> list[Tensor]:
    """Draw one response a prompt: softmax(logits / temperature), token by token, up to an end-of-sequence token.

    A checkpoint's ``generation_config`` says how to decode well (top-p,
    penalties, beams, suppressed tokens ...), so it draws from another
    distribution than the policy; it has no effect here. The training's random
    streams are left alone.

    Raises:
        TypeError: no model that generates, or one that has an encoder.
        ValueError: an option out of range, or one that makes something else
            of a prompt than one sequence that goes on from it; or a token id
            that the model does not have.
    """
    check_model(model)
    _check_prompts(model, prompts)
    options = _options(max_new_tokens, temperature, options)
    remaining, responses = reported(prompts, progress), []
    # A default device would reach the tensors that generate() makes: torch's own is the CPU.
    with isolated([model]), _neutral(model), torch.device("cpu"):
        torch.manual_seed(seed)
        for prompt in remaining:
            # One prompt at a time: no padding, so nothing depends on how a model treats it.
            ids = prompt[None]
            drawn = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            responses.append(_response(drawn, prompt))
    return responses


def check_model(model: Any) -> None:
    """Refuse what cannot go on from a prompt."""
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise TypeError(f"responses are drawn from a model with generate(), not {type(model).__name__}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"a response is what follows its prompt, but {type(model).__name__} has an encoder, which reads it; "
            "use a decoder-only model"
        )


def device_of(model: Any) -> torch.device:
    """Return where a model reads its prompts.

    Raises:
        TypeError: no model that responses can be drawn from.
    """
    check_model(model)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _check_prompts(model: Any, prompts: Sequence[Tensor]) -> None:
    """Refuse ids that the model cannot look up: on a GPU that is an error from which no process recovers."""
    try:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):  # a model that does not tell
        return
    if isinstance(size, int):
        check_vocabulary(prompts, size)


def _options(max_new_tokens: int, temperature: float, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of generate(): plain sampling, and what was asked for by name or in a config."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be positive and finite; for the likeliest tokens give do_sample=False"
        )
    asked = _by_name(asked)
    for name in ("max_new_tokens", "temperature"):
        if name in asked:
            raise ValueError(f"generation_config has {name}={asked[name]}; give {name}= as an argument")
    if asked.get("max_length") is not None:
        raise ValueError(f"max_length={asked['max_length']} would count the prompt's tokens; use max_new_tokens")
    sampling = {"do_sample": True, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}
    return {**sampling, "max_new_tokens": max_new_tokens, "pad_token_id": 0, **asked}


def _by_name(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Options one by one, also those that a generation config sets."""
    named = dict(asked)
    config = named.pop("generation_config", None)
    if config is None:
        return named
    own = {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}
    own.pop("transformers_version", None)
    return own | named


@contextmanager
def _neutral(model: nn.Module) -> Iterator[None]:
    """Have a generation config that asks for nothing in each module that has one, and put theirs back afterwards."""
    kept = [(vars(module), "generation_config" in vars(module)) for module in model.modules()]
    configs = [own.get("generation_config") for own, _ in kept]

    def restore() -> None:
        for (own, had), config in zip(kept, configs, strict=True):
            if had:
                own["generation_config"] = config
            else:
                own.pop("generation_config", None)  # PEFT leaves one in modules that had none

    with undone(restore):
        for (own, _), config in zip(kept, configs, strict=True):
            if config is not None:
                own["generation_config"] = _empty(config)
        yield


def _empty(config: Any) -> Any:
    empty = type(config)()
    for name in KEPT:
        if getattr(config, name, None) is not None:
            setattr(empty, name, getattr(config, name))
    return empty


def _response(drawn: Any, prompt: Tensor) -> Tensor:
    """What was drawn after the prompt, from generate()'s result."""
    sequences = getattr(drawn, "sequences", drawn)
    if not isinstance(sequences, Tensor):
        raise ValueError(f"generate() returned {shown(drawn)}; a tensor of token ids is needed")
    if sequences.dim() != 2 or len(sequences) != 1:
        raise ValueError(
            f"generate() returned ids of shape {tuple(sequences.shape)} for one prompt; one sequence is needed, "
            "so leave out options like num_return_sequences"
        )
    if not torch.equal(sequences[0, : len(prompt)].to(prompt), prompt):
        raise ValueError(
            "generate() returned a sequence that does not begin with its prompt; leave out options that change "
            "prompts, and models that read them as embeddings (prompt tuning)"
        )
    return sequences[0, len(prompt) :].clone()
