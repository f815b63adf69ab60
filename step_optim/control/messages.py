"""Chat messages: mappings of a role and a content, which is a text or comes in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from step_optim.control.listing import is_list

Message = Mapping[str, Any]


def answer(text: str, messages: Sequence[Message]) -> Message:
    """Return a text as the assistant's message, in the form that the other messages have.

    >>> answer("four", [{"role": "user", "content": "2 + 2?"}])
    {'role': 'assistant', 'content': 'four'}
    """
    in_parts = any(is_list(message.get("content")) for message in messages)
    return {"role": "assistant", "content": [{"type": "text", "text": text}] if in_parts else text}


def text_of(message: Message) -> str:
    """Return the text of a message, put together if it comes in parts; "" if there is none.

    >>> text_of({"role": "user", "content": [{"type": "text", "text": "2 + 2"}, {"type": "text", "text": "?"}]})
    '2 + 2?'
    """
    content: Any = message.get("content") or ""
    parts = content if is_list(content) else [{"text": content}]
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, Mapping))


def check_written(message: Message, text: str) -> None:
    """Refuse what a chat template wrote without a message that it was given.

    Only the last word is looked for: templates cut white space, and thoughts before an answer.

    Raises:
        ValueError: a message of the user or the assistant is not there.
    """
    last = text_of(message).split()[-1:]
    if message.get("role") in ("user", "assistant") and not message.get("tool_calls") and last and last[0] not in text:
        form = "a text" if is_list(message.get("content")) else 'parts, [{"type": "text", "text": ...}]'
        raise ValueError(f"the chat template leaves out the content of a message; it may want it as {form}")
