"""A policy of rows in a checkpoint: pi_ref, so that drift goes on being measured from the start of training."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from step_optim.audit.draws import keys_of
from step_optim.audit.rows import Head, Rows
from step_optim.control.control_set import ControlSet


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
        if _is_frozen(live) and _equal(head, live):
            head = live  # one head in memory, not two
    shape = len(prompt_of_row), vocabulary if head is None else head.weight.shape[1]
    if x.shape != shape:
        raise ValueError(f"the checkpoint's pi_ref has the shape {tuple(x.shape)}, not {shape}, [response token, D]")
    return Rows(x, head)


def take_origins(parts: Sequence[Any], known: Sequence[Any]) -> bool:
    """Give `TokenKL`s of one model the pi_ref of others, whose sets together have all their prompts.

    Args:
        parts: their pi_ref is set, or that of none of them.
        known: those without a pi_ref are left out.

    Returns:
        Whether all prompts, with their responses, were found.
    """
    known = [part for part in known if part.has_origin]
    rows = [rows_of_texts(part.control, [(other.control, other._origin.x) for other in known]) for part in parts]
    if not known or any(x is None for x in rows):
        return False
    head = known[0]._origin.head
    for part, x in zip(parts, rows, strict=True):
        assert x is not None
        own = part._head(live=True)
        is_live = own is not None and head is not None and own.weight is head.weight
        part._origin = Rows(x, own if is_live else head)
    return True


def rows_of_texts(control: ControlSet, known: Iterable[tuple[ControlSet, Tensor]]) -> Tensor | None:
    """Find a policy's rows on some prompts among those on others.

    Args:
        control: prompts with their responses, R' tokens.
        known: further ones, with the rows [R, D] of their tokens.

    Returns:
        [R', D]; None if a prompt, with its response, is in none of them.
    """
    places: dict[Any, Tensor] = {}
    for others, x in known:
        rows: Sequence[Tensor] = x.split(others.response_lengths)  # type: ignore[no-untyped-call]
        places |= dict(zip(_texts(others), rows, strict=True))
    found = [places.get(text) for text in _texts(control)]
    kept = [part for part in found if part is not None]
    return torch.cat(kept) if len(kept) == len(found) else None


def _texts(control: ControlSet) -> list[Hashable]:
    """What each prompt with its response is known by."""
    responses = [tuple(response.tolist()) for response in control.responses]
    return list(zip(keys_of(control, control), responses, strict=True))


def _shapes(head: Head) -> list[tuple[int, ...]]:
    return [tuple(part.shape) for part in _parts(head)]


def _parts(head: Head) -> list[Tensor]:
    return [part for part in (head.weight, head.bias) if part is not None]


def _is_frozen(head: Head) -> bool:
    return not any(part.requires_grad for part in _parts(head))


def _equal(a: Head, b: Head) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(_parts(a), _parts(b), strict=True))
