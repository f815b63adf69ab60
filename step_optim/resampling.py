"""Fresh responses, drawn from the current policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from step_optim.isolation import isolated


def draw_responses(model: Any, prompts: Sequence[Tensor], seed: int, options: Mapping[str, Any]) -> list[Tensor]:
    """Draw one response a prompt; the training's random streams are left alone."""
    if not hasattr(model, "generate"):
        raise TypeError(f"resample needs a model with generate(), not {type(model).__name__}")
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0, **options}
    responses = []
    with isolated([model]):
        torch.manual_seed(seed)
        for prompt in prompts:
            # One prompt at a time: no padding, so nothing depends on how a model treats it.
            ids = prompt[None]
            drawn = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            responses.append(drawn[0, len(prompt) :].clone())
    return responses
