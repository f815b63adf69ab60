"""A policy of rows in a checkpoint: pi_ref, so that drift goes on being measured from the start of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from step_optim.audit.rows import Head, Rows


def state_of_rows(policy: Rows, live: Head | None) -> dict[str, Any]:
    """Return what a checkpoint holds: hidden states [R, D], with the head [V, D] that they had; or logits [R, V].

    Args:
        policy: what is saved.
        live: the model's own head; it is left out, for whoever resumes has it.
    """
    state = {"x": policy.x}
    head = policy.head
    return state if head is None or head is live else state | {"weight": head.weight, "bias": head.bias}


def rows_from_state(state: Mapping[str, Any], live: Head | None, prompt_of_row: Tensor, vocabulary: int) -> Rows:
    """Read what `state_of_rows` returned.

    Args:
        state: of this run, or of another.
        live: the model's own head, if hidden states are kept.
        prompt_of_row: [R] the rows that it has to have, on the device where they shall live.
        vocabulary: V.

    Raises:
        ValueError: the shapes are those of other rows, or of another head.
    """
    x, head = state["x"].to(prompt_of_row.device), live
    if live is not None and not state.keys().isdisjoint(("weight", "bias")):
        head = Head(state["weight"].to(x.device), None if state["bias"] is None else state["bias"].to(x.device))
        if _shapes(head) != _shapes(live):
            raise ValueError(f"the checkpoint's pi_ref has a head of shapes {_shapes(head)}, not {_shapes(live)}")
    shape = len(prompt_of_row), vocabulary if head is None else head.weight.shape[1]
    if x.shape != shape:
        raise ValueError(f"the checkpoint's pi_ref has the shape {tuple(x.shape)}, not {shape}, [response token, D]")
    return Rows(x, head)


def _shapes(head: Head) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in (head.weight, head.bias) if part is not None]
