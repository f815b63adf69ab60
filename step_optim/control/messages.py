"""Chat messages: mappings of a role and a content, which is a text or comes in parts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from step_optim.control.listing import is_list, shown

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


def in_text(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose contents are texts, put together where they come in parts.

    >>> in_text([{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}])
    [{'role': 'user', 'content': '2 + 2?'}]
    """
    return [
        {**message, "content": text_of(message)} if is_list(message.get("content")) else message for message in messages
    ]


def is_printed(messages: Sequence[Message], text: str) -> bool:
    """Whether a template that wants texts wrote the parts of a content as Python writes a list."""
    return any(is_list(content) and str(content) in text for content in (m.get("content") for m in messages))


def check_written(messages: Sequence[Message], tools: Any, text: str) -> None:
    """Refuse what a chat template wrote without what it was given.

    Only the last word of a message is looked for: templates cut white space,
    and thoughts before an answer. A system message or tools that it leaves out
    are warned of.

    Raises:
        ValueError: a message of the user or the assistant is not there, or a
            call of a tool in the last one.
    """
    for message in messages:
        if not message.get("tool_calls") and not _is_there(message, text):
            _tell(message)
    for name in map(_name_of, messages[-1].get("tool_calls") or ()):
        if name and name not in text:
            raise ValueError(
                f"the chat template leaves out the call of {name!r}; leave the conversation out, or give a tokenizer "
                "whose template writes calls of tools"
            )
    names = [name for name in map(_name_of, tools or ()) if name]
    if names and not any(name in text for name in names):
        warnings.warn(f"the chat template writes nothing of tools={names}: they have no effect", stacklevel=2)


def _is_there(message: Message, text: str) -> bool:
    return not (last := text_of(message).split()[-1:]) or last[0] in text


def _tell(message: Message) -> None:
    """Say what a template has left out."""
    if message.get("role") in ("user", "assistant"):
        form = "a text" if is_list(message.get("content")) else 'parts, [{"type": "text", "text": ...}]'
        raise ValueError(f"the chat template leaves out the content of a message; it may want it as {form}")
    warnings.warn(
        f"the chat template leaves out the {message.get('role')} message {shown(text_of(message))}: the model is not "
        "told it",
        stacklevel=2,
    )


def _name_of(tool: Any) -> str | None:
    """The name of a tool, or of what a call calls."""
    if not isinstance(tool, Mapping):
        return getattr(tool, "__name__", None)
    inner = tool.get("function", tool)
    return inner.get("name") if isinstance(inner, Mapping) else None
