"""The first forward of a model: whether it can read the control set, and if not, why."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from step_optim.audit.batches import Batch
from step_optim.audit.reader import Reading
from step_optim.control.control_set import ControlBatches, ControlSet
from step_optim.control.given import GivenBatch

READING_FAILS = (TypeError, ValueError, AttributeError, AssertionError, RuntimeError, LookupError)
"""What a forward raises that cannot read a batch."""


def read_checked(reading: Reading, control: ControlSet, batch: Batch) -> Tensor:
    """Return the model's own logits [r, V] of one batch's response rows.

    Raises:
        ValueError: it cannot read the batch; with the reason and the remedy.
    """
    try:
        return reading.rows(batch, readout="full")
    except torch.OutOfMemoryError:
        raise
    except READING_FAILS as error:
        raise ValueError(_why(reading.model, control, batch, error)) from error


def _why(model: nn.Module, control: ControlSet, batch: Batch, error: Exception) -> str:
    if batch.given is not None and isinstance(control, ControlBatches):
        return (
            f"TokenKL cannot read {type(model).__name__} on batch {_number(control, batch.given)} "
            f"({type(error).__name__}: {error}). It calls model(**batch) without the labels; the batch has "
            f"{sorted(batch.given.arguments)}. Give batches that the model takes: no other arguments, no ids outside "
            "its vocabulary, no more tokens than it reads"
        )
    if isinstance(error, IndexError):
        return _why_unreadable(model, control, error)
    return (
        f"TokenKL cannot read {type(model).__name__} ({type(error).__name__}: {error}). It needs a causal "
        "language model: model(input_ids) -> logits [batch, tokens, vocabulary]. Wrap the model in a module "
        "whose forward takes token ids alone, give it the batches that it takes (ControlSet.from_batches), or use "
        "PolicyKL"
    )


def _number(control: ControlBatches, batch: GivenBatch) -> int:
    return next(number for number, each in enumerate(control.batches) if each is batch)


def _why_unreadable(model: nn.Module, control: ControlSet, error: IndexError) -> str:
    """Tell a token id that is too large from a text that is too long: both are an index beyond some table."""
    if not _reads(model, control.prompts[0].new_zeros(1)):
        return f"TokenKL cannot read {type(model).__name__}: its forward raises IndexError ({error})"
    texts = [torch.cat(pair) for pair in zip(control.prompts, control.responses, strict=True)]
    for i, text in enumerate(texts):
        if _reads(model, text):
            continue
        if not _reads(model, text.max()[None]):
            return f"prompt {i} of the control set has a token id outside the vocabulary of the model"
        return (
            f"prompt {i} of the control set has {len(text)} tokens with its response, more than the model can read "
            f"({_positions(model)}); use a shorter prompt or response"
        )
    return f"the model cannot read the control set (IndexError: {error})"


def _reads(model: nn.Module, text: Tensor) -> bool:
    try:
        model(text[None])
    except IndexError:
        return False
    return True


def _positions(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    found = [f"{name}={getattr(config, name)} in its config" for name in names if hasattr(config, name)]
    return found[0] if found else "its table of positions is shorter"
