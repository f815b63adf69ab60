"""Conversations as people keep them: lists of messages, data sets, JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from step_optim.control.listing import is_list, response_texts, shown
from step_optim.control.messages import Message, answer
from step_optim.host.paths import user_path

MESSAGES = ("messages", "conversation", "conversations", "prompt")
"""Keys of a record that may hold its messages; one of them does."""

ANSWERS = ("completion", "response")
"""Keys of a record that may hold an answer which is not among its messages: a text, or messages."""


@dataclass(frozen=True)
class Conversation:
    """One record, taken apart."""

    messages: Sequence[Message]
    """What comes before the answer."""

    answer: Message | None
    """The assistant's last message, the response; None if there is none yet."""

    label: Any = None
    """The slice that the record names."""

    tools: Any = None
    """What the assistant may call."""


def read_conversations(given: Any, *, tools: Any = None) -> list[Conversation]:
    """Take apart what was given.

    Args:
        given: a list of conversations, each a list of messages or a record of
            them (a mapping with one of `MESSAGES`, perhaps one of `ANSWERS`,
            "slice" and "tools"); a data set of such records; or the path of a
            JSON or JSON Lines file of either.
        tools: of conversations whose records name none.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: in another form.
        ValueError: a conversation that lacks something, or has it twice; the message names it.
    """
    records = _records(given)
    if records and isinstance(records[0], Mapping) and "role" in records[0]:
        raise TypeError("conversations is one conversation; put it into a list, conversations=[[{...}, ...]]")
    return [_read(record, f"conversation {i}", tools) for i, record in enumerate(records)]


def with_answers(conversations: Sequence[Conversation], responses: Any, *, drawn: bool) -> list[Conversation]:
    """Give each conversation the one answer that is meant.

    Args:
        conversations: with answers of their own, or without.
        responses: texts, one for each conversation, or None.
        drawn: whether a model is to answer.

    Raises:
        TypeError: responses that are no texts.
        ValueError: a conversation with two answers or none; the message names it.
    """
    if responses is not None and drawn:
        raise ValueError("responses= and model= both give the responses; leave out one of them")
    source = "model=" if drawn else "responses=" if responses is not None else None
    for i, conversation in enumerate(conversations):
        if source and conversation.answer:
            raise ValueError(
                f"conversation {i} ends with an assistant message, which is its response, and {source} gives another "
                "one; leave out either"
            )
        if not source and not conversation.answer:
            raise ValueError(
                f"conversation {i} has no response: its last message is by {conversation.messages[-1]['role']!r}; "
                "end it with an assistant message, or give responses= or model="
            )
    if responses is None:
        return list(conversations)
    texts = response_texts(responses)
    if len(texts) != len(conversations):
        raise ValueError(f"{len(conversations)} conversations but {len(texts)} responses; give each of them one")
    return [
        replace(conversation, answer=answer(text, conversation.messages))
        for conversation, text in zip(conversations, texts, strict=True)
    ]


def labels_of(conversations: Sequence[Conversation]) -> list[Any] | None:
    """Return the slice of each conversation as its record names it; None if none of them does.

    Raises:
        ValueError: some do, and some do not.
    """
    without = [i for i, conversation in enumerate(conversations) if conversation.label is None]
    if len(without) == len(conversations):
        return None
    if without:
        raise ValueError(f'conversation {without[0]} names no "slice", others do; give each a slice, or slices=')
    return [conversation.label for conversation in conversations]


def _records(given: Any) -> list[Any]:
    if isinstance(given, (str, Path)):
        return _from_file(user_path(given))
    if isinstance(given, Mapping):
        raise TypeError(
            f"conversations is a mapping with the keys {sorted(map(str, given))}; give a list of conversations, or one "
            "part of a data set, such as dataset['train']"
        )
    if not is_list(given):
        raise TypeError(f"conversations={shown(given)} is no list of conversations, no data set and no path")
    records = list(given)
    # Arrow has one schema for all records, and None where a record lacks what another one has.
    return [_without_none(record) for record in records] if hasattr(given, "features") else records


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _from_file(path: Path) -> list[Any]:
    """Records of a JSON file, which is one list, or of a JSON Lines file, one a line."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a JSON Lines file of conversations, or a list of them")
    text = path.read_text(encoding="utf-8-sig")  # with the mark that some editors put in front, or without
    if path.suffix == ".json":
        records = _parsed(text, str(path))
        if not isinstance(records, list):
            raise ValueError(f"{path} holds {shown(records)}; give a list of conversations, or a .jsonl file")
        return records
    lines = enumerate(text.split("\n"), 1)  # not splitlines(), which also splits at characters that JSON allows
    return [_parsed(line, f"line {number} of {path}") for number, line in lines if line.strip()]


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({error})") from error


def _read(record: Any, what: str, tools: Any) -> Conversation:
    fields = record if isinstance(record, Mapping) else {"messages": record}
    messages = _messages(fields, what)
    own = fields.get("tools")
    if own is not None and tools is not None:
        raise ValueError(f"{what} names tools of its own, and tools= gives others; leave out either")
    if isinstance(own, str):  # as data sets keep them, whose columns cannot hold every schema
        own = _parsed(own, f"tools of {what}")
    last = messages[-1] if messages[-1]["role"] == "assistant" else None
    before = messages[:-1] if last else messages
    if not before:
        raise ValueError(f"{what} begins with its answer; put the message before it that it answers")
    return Conversation(before, last, fields.get("slice"), tools if own is None else own)


def _messages(fields: Mapping[str, Any], what: str) -> list[Message]:
    """The messages of a record, the answer at their end if it has one."""
    given = {key: value for key, value in fields.items() if value is not None}
    if "messages" in given and isinstance(given.get("prompt"), str):  # the first message once more, as text
        del given["prompt"]
    found, answers = ([key for key in keys if key in given] for keys in (MESSAGES, ANSWERS))
    if len(found) != 1:
        raise ValueError(
            f"{what} has {found or 'no messages'} among its keys {sorted(map(str, fields))}; "
            'give "messages", or "prompt" with "completion"'
        )
    messages = _checked(given[found[0]], what)
    if not answers:
        return messages
    if len(answers) > 1 or messages[-1]["role"] == "assistant":
        raise ValueError(f"{what} has more than one answer, {answers} and its messages; leave out the others")
    last = given[answers[0]]
    return messages + ([answer(last, messages)] if isinstance(last, str) else _checked(last, what))


def _checked(given: Any, what: str) -> list[Message]:
    """Refuse what is no list of messages in text."""
    messages = list(given) if is_list(given) else []
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError(f'{what} is {shown(given)}; give a list of messages, [{{"role": "user", "content": ...}}]')
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise ValueError(f'{what} has the message {shown(message)} without a "role"; give "role" and "content"')
        _check_content(message, what)
    return messages


def _check_content(message: Message, what: str) -> None:
    content: Any = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if not is_list(content) or not all(isinstance(part, Mapping) for part in content):
        raise TypeError(f"{what} has the content {shown(content)}; give a text, or a list of parts of type text")
    other = [part for part in content if part.get("type") != "text" or not isinstance(part.get("text"), str)]
    if other:
        raise ValueError(f"{what} has the part {shown(other[0])}; a control set holds token ids, so give text alone")
