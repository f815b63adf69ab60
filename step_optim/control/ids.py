"""Token ids as they are given: lists, arrays, tensors, and what a tokenizer returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from step_optim.control.listing import is_list, listed, plain, shown


def rows_of_ids(values: Any, name: str) -> list[Any]:
    """One list of ids for each prompt, not yet looked into."""
    if isinstance(values, Mapping) and "input_ids" in values:
        values = _without_padding(values, name)
    if not is_list(values):
        raise TypeError(f"{name}={shown(values)} is no list; give one list of token ids for each prompt, in order")
    rows = list(values)
    if rows and isinstance(plain(rows[0]), Integral):
        raise TypeError(
            f"{name}={shown(values)} is one list of token ids; give one for each prompt, {name}=[[...], ...]"
        )
    return rows


def _without_padding(encoding: Mapping[str, Any], name: str) -> Any:
    """Ids of a tokenizer's batch, as far as its attention mask goes."""
    ids, mask = listed(encoding["input_ids"]), encoding.get("attention_mask")
    if mask is None or not ids or not is_list(ids[0]):
        return ids
    pairs = zip(ids, listed(mask), strict=True)
    return [[token for token, real in zip(listed(row), listed(flags), strict=True) if real] for row, flags in pairs]


def checked_ids(ids: Any, what: str, device: torch.device | str) -> Tensor:
    """Return the ids of one text as an int64 tensor of its own."""
    if isinstance(ids, Mapping) and "input_ids" in ids:
        ids = ids["input_ids"]
    if isinstance(ids, str):
        raise TypeError(f"{what} is the text {shown(ids)}; give token ids, or use ControlSet.from_texts")
    if isinstance(ids, Tensor) and ids.is_meta:
        raise ValueError(f"{what} is a tensor on the meta device, which holds no token ids; give a list")
    try:
        tensor = torch.as_tensor(ids if hasattr(ids, "__len__") else list(ids), device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be a flat list of token ids, not {shown(ids)}") from error
    if tensor.numel() == 0:
        raise ValueError(f"{what} has no tokens; every prompt needs one and every response needs one")
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{what} must be a flat list of token ids, not {tuple(tensor.shape)} of {tensor.dtype}")
    tensor = tensor.to(torch.long, copy=True)
    if int(tensor.min()) < 0:
        raise ValueError(f"{what} has the negative token id {int(tensor.min())}; ids start at 0")
    return tensor.to(device)


def shortened(rows: Sequence[list[int]], max_response_tokens: int | None) -> list[list[int]]:
    """Return the responses, cut to ``max_response_tokens`` if it is given.

    >>> shortened([[1, 2, 3], [4]], 2)
    [[1, 2], [4]]

    Raises:
        ValueError: fewer than one token would be left.
    """
    if max_response_tokens is not None and max_response_tokens < 1:
        raise ValueError(f"max_response_tokens={max_response_tokens} must be at least 1, or None")
    return [row[:max_response_tokens] for row in rows]


def check_vocabulary(texts: Iterable[Tensor], vocab_size: int) -> None:
    """Refuse ids that a model with ``vocab_size`` tokens does not have.

    Raises:
        ValueError: there is one; the message names its prompt.
    """
    for i, text in enumerate(texts):
        largest = int(text.max())
        if largest >= vocab_size:
            raise ValueError(
                f"prompt {i} of the control set has token id {largest}, outside the vocabulary of {vocab_size}; "
                "was it made with another tokenizer?"
            )


def check_responses(responses: Iterable[Tensor], vocab_size: int) -> None:
    """Refuse responses that a model with ``vocab_size`` logits a token cannot say.

    Raises:
        ValueError: there is one; the message names its prompt.
    """
    for i, response in enumerate(responses):
        if int(response.max()) >= vocab_size:
            raise ValueError(
                f"the response of prompt {i} has token id {int(response.max())}, and the model has {vocab_size} "
                "logits a token: it is no causal language model over these tokens (a token classifier?)"
            )
