"""The assistant's turn in a conversation: where its answer begins in the ids, and which token ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from step_optim.control.messages import Message, answer
from step_optim.control.tokenizer import Tokenizer

PROBE = "zq7answer"
"""A word that no template writes by itself."""

NO_END = "the tokenizer has no eos_token_id; set tokenizer.eos_token, or leave the end out with end_of_turn=False"


def end_of_turn(tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Any = None) -> int | None:
    """Return the token that ends an answer to these messages; None if there is none.

    It is what the template writes after an answer: the first special token
    there, or all that is written if that is one token. Where the template
    writes neither, only the end of the sequence can end an answer.
    """
    whole = tokenizer.render([*messages, answer(PROBE, messages)], tools=tools, answered=True)
    ids = tokenizer.ids(whole.rpartition(PROBE)[2].strip())
    special = [token for token in ids if token in tokenizer.special]
    return next(iter(special or (ids if len(ids) == 1 else ())), tokenizer.end_of_sequence)


def answer_ids(tokenizer: Tokenizer, before: str, whole: str, end: int | None) -> list[int] | None:
    """Return the ids of an answer as the template writes it, without the token that ends it and what follows.

    Args:
        tokenizer: that reads both texts.
        before: the conversation where the answer is to begin.
        whole: the conversation with the answer.
        end: the token that ends it.

    Returns:
        None if that cannot be told: the whole does not begin with what comes
        before the answer, or the template writes no end.
    """
    if not whole.startswith(before):
        return None
    prompt, ids = tokenizer.ids(before), tokenizer.ids(whole)
    # A text read by itself may begin with another token than at its place, so it is read there if its prompt is.
    ids = ids[len(prompt) :] if ids[: len(prompt)] == prompt else tokenizer.ids(whole[len(before) :])
    return ids[: len(ids) - 1 - ids[::-1].index(end)] if end in ids else None
