"""The first forward of a model: whether it can read the control set, and if not, why."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from step_optim.audit.batches import Batch
from step_optim.audit.reader import Reading
from step_optim.control.control_set import ControlSet


def read_checked(reading: Reading, control: ControlSet, batch: Batch) -> Tensor:
    """Return the model's own logits [r, V] of one batch's response rows.

    Raises:
        ValueError: it cannot read the batch; with the reason and the remedy.
    """
    model = reading.model
    try:
        return reading.rows(batch, readout="full")
    except IndexError as error:
        raise ValueError(_why_unreadable(model, control, error)) from error
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"TokenKL cannot read {type(model).__name__} ({type(error).__name__}: {error}). It needs a causal "
            "language model: model(input_ids) -> logits [batch, tokens, vocabulary]. Wrap the model in a module "
            "whose forward takes token ids alone, or use PolicyKL"
        ) from error


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
