"""From conversations to token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from step_optim.control.conversations import Conversation
from step_optim.control.messages import Message, text_of
from step_optim.control.tokenizer import Tokenizer
from step_optim.control.turns import NO_END, answer_ids, end_of_turn

Result = TypeVar("Result")


class Chats:
    """Conversations, and the tokenizer whose chat template writes them.

    Args:
        tokenizer: a Hugging Face tokenizer or processor with a chat template.
        conversations: with their answers, unless a model is to give them.

    Raises:
        ValueError: the template refuses a conversation; the message names it.
    """

    def __init__(self, tokenizer: Any, conversations: Sequence[Conversation]) -> None:
        self._tokenizer = Tokenizer(tokenizer)
        self._conversations = conversations
        self._before = [self._rendered(i, each.messages) for i, each in enumerate(conversations)]

    def prompt_ids(self) -> list[list[int]]:
        """Return the ids of each conversation, up to where the assistant begins its answer."""
        return [self._tokenizer.ids(text) for text in self._before]

    def response_ids(self, *, end: bool) -> list[list[int]]:
        """Return the ids of each answer, with the token that ends it if ``end``.

        Raises:
            ValueError: the template refuses an answer, no token ends it, or it
                is not found in what the template writes; the message names the conversation.
        """
        return [self._response(i, each.messages, each.answer or {}, end) for i, each in enumerate(self._conversations)]

    def _response(self, i: int, messages: Sequence[Message], answer: Message, end: bool) -> list[int]:
        whole = self._rendered(i, [*messages, answer], answered=True)
        tools = self._conversations[i].tools
        last = _of_conversation(i, lambda: end_of_turn(self._tokenizer, messages, tools=tools))
        ids = answer_ids(self._tokenizer, self._before[i], whole, last)
        if ids is None:
            ids = self._tokenizer.ids(_only_text(answer, i))
        if not end:
            return ids
        if last is None:
            raise ValueError(f"the chat template writes no token after the answer of conversation {i}, and {NO_END}")
        return ids if ids[-1:] == [last] else [*ids, last]  # the answer may have it in its text

    def _rendered(self, i: int, messages: Sequence[Message], *, answered: bool = False) -> str:
        tools = self._conversations[i].tools
        return _of_conversation(i, lambda: self._tokenizer.render(messages, tools=tools, answered=answered))


def _of_conversation(i: int, render: Callable[[], Result]) -> Result:
    """Name the conversation that a template refuses: with an exception of any type, since it is a program."""
    try:
        return render()
    except Exception as error:
        raise ValueError(
            f"conversation {i} does not go through the chat template ({type(error).__name__}: {error})"
        ) from error


def _only_text(answer: Message, i: int) -> str:
    """The answer's text, where that is all of it."""
    other = sorted(str(key) for key in set(answer) - {"role", "content"} if answer[key])
    text = text_of(answer)
    if other or not text:
        raise ValueError(
            f"the answer of conversation {i} is not found in what the chat template writes, which has no end of turn "
            f"or does not begin with its own generation prompt, and {other or 'an empty answer'} cannot be read as "
            "plain text; leave the conversation out"
        )
    return text


def check_arguments(model: Any, end_of_turn: bool, max_response_tokens: int | None, draw: Mapping[str, Any]) -> None:
    """Refuse arguments that would have no effect; ``draw`` has those of a draw that were given.

    Raises:
        TypeError: arguments of a draw without a model.
        ValueError: arguments of given responses for drawn ones.
    """
    if model is None and draw:
        raise TypeError(f"{sorted(draw)} are arguments of a draw; give model=, or leave them out")
    if model is not None and not end_of_turn:
        raise ValueError("end_of_turn=False with model=: a drawn response keeps the token that ended it; leave it out")
    if model is not None and max_response_tokens is not None:
        raise ValueError(f"max_response_tokens={max_response_tokens} with model=: use max_new_tokens")
