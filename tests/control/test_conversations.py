"""Conversations in every form in which people keep them, and what is missing or said twice in them."""

import json

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_optim import ControlSet
from step_optim.control.conversations import read_conversations
from tests.templates import STYLES, WITH_TOOLS, byte_tokenizer

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Yo"}
CHAT = [USER, BOT]
TOOLS = [{"type": "function", "function": {"name": "look"}}]
TOKENIZER = STYLES["chatml"].tokenizer()

FORMS = {
    "messages": CHAT,
    "a tuple of messages": tuple(CHAT),
    "a record": {"messages": CHAT},
    "another name": {"conversation": CHAT, "id": 7},
    "a third one": {"conversations": CHAT},
    "prompt and completion": {"prompt": [USER], "completion": [BOT]},
    "a completion as text": {"prompt": [USER], "completion": "Yo", "messages": None},
    "a response": {"prompt": [USER], "response": "Yo"},
    "messages and a response": {"messages": [USER], "response": "Yo"},
}


def read(conversations, *args, **options) -> list[tuple[str, str]]:
    """Prompts and responses as texts."""
    return ControlSet.from_messages(TOKENIZER, conversations, *args, **options).decode(TOKENIZER)


@given(
    names=st.lists(st.sampled_from(sorted(FORMS)), min_size=1, max_size=5), made=st.sampled_from([list, tuple, iter])
)
def test_all_forms_are_the_same_conversation(names, made) -> None:
    """A list may mix them, and may be any iterable."""
    assert read(made([FORMS[name] for name in names])) == read([CHAT]) * len(names)


@pytest.mark.parametrize(("name", "write"), [("c.json", json.dumps), ("c.jsonl", None), ("c.txt", None)])
def test_files(tmp_path, monkeypatch, name, write) -> None:
    """A JSON file is one list; any other has a record on each line, and blank lines between; `~` is the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    odd = [{"role": "user", "content": "one\u2028line é"}, BOT]
    records = [CHAT, {"messages": odd}, FORMS["a response"]]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
    (tmp_path / name).write_text(write(records) if write else lines, encoding="utf-8")
    for path in (tmp_path / name, str(tmp_path / name), f"~/{name}"):
        assert read(path) == read(records)


def test_a_data_set() -> None:
    """Its records, without the gaps that a common schema puts into some of them."""
    tokenizer = byte_tokenizer(WITH_TOOLS, ("<|im_start|>", "<|im_end|>"))
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}
    records = [{"messages": CHAT, "slice": "talk"}, {"messages": [USER, call], "slice": "tools"}]
    kept = datasets.Dataset.from_list(records)
    assert kept[0]["messages"][0] == {**USER, "tool_calls": None}
    assert read_conversations(kept) == read_conversations(records)
    control = ControlSet.from_messages(tokenizer, kept)
    assert control == ControlSet.from_messages(tokenizer, records)
    assert dict(control.slices) == {"talk": (0,), "tools": (1,)}
    with pytest.raises(TypeError, match=r"mapping with the keys \['test', 'train'\].*such as dataset\['train'\]"):
        ControlSet.from_messages(tokenizer, datasets.DatasetDict({"train": kept, "test": kept}))


def test_slices_of_the_records() -> None:
    """They are used unless others are given; all records have one, or none has."""
    records = [{"messages": CHAT, "slice": name} for name in "aba"]
    assert dict(ControlSet.from_messages(TOKENIZER, records).slices) == {"a": (0, 2), "b": (1,)}
    assert dict(ControlSet.from_messages(TOKENIZER, records, slices={"c": [1]}).slices) == {"c": (1,)}
    assert dict(ControlSet.from_messages(TOKENIZER, [CHAT]).slices) == {}
    with pytest.raises(ValueError, match=r'conversation 3 names no "slice", others do'):
        ControlSet.from_messages(TOKENIZER, [*records, CHAT])
    with pytest.raises(TypeError, match="the label of prompt 0 is 5, and labels are texts"):
        ControlSet.from_messages(TOKENIZER, [{"messages": CHAT, "slice": 5}])


def test_tools_of_the_records() -> None:
    """Each record may have its own, also as JSON; they are those that `tools=` would give to all."""
    tokenizer = byte_tokenizer(WITH_TOOLS, ("<|im_start|>", "<|im_end|>"))
    expected = ControlSet.from_messages(tokenizer, [CHAT], tools=TOOLS)
    for own in (TOOLS, json.dumps(TOOLS)):
        records = [{"messages": CHAT, "tools": own}, {"messages": CHAT}]
        control = ControlSet.from_messages(tokenizer, records)
        assert control.select([0]) == expected
        assert control.select([1]) == ControlSet.from_messages(tokenizer, [CHAT])
    with pytest.raises(ValueError, match="conversation 0 names tools of its own, and tools= gives others"):
        ControlSet.from_messages(tokenizer, records, tools=TOOLS)
    with pytest.raises(ValueError, match="tools of conversation 0 is no JSON"):
        ControlSet.from_messages(tokenizer, [{"messages": CHAT, "tools": "look"}])


@pytest.mark.parametrize(
    ("conversations", "error", "message"),
    [
        (CHAT, TypeError, r"conversations is one conversation; put it into a list, conversations=\[\[{"),
        ({"messages": CHAT}, TypeError, r"a mapping with the keys \['messages'\]; give a list"),
        (5, TypeError, "conversations=5 is no list of conversations, no data set and no path"),
        ("nowhere.jsonl", FileNotFoundError, "there is no file nowhere.jsonl; give a JSON Lines file"),
        ([], ValueError, "the control set is empty"),
        ([CHAT, []], TypeError, r"conversation 1 is \[\]; give a list of messages"),
        ([CHAT, "Hi"], TypeError, "conversation 1 is 'Hi'; give a list of messages"),
        ([["Hi"]], TypeError, r"conversation 0 is \['Hi'\]; give a list of messages"),
        ([{"prompt": "Hi", "completion": "Yo"}], TypeError, "conversation 0 is 'Hi'; give a list of messages"),
        ([[{"from": "human", "value": "Hi"}]], ValueError, 'conversation 0 has the message .* without a "role"'),
        ([{"text": "Hi"}], ValueError, r"conversation 0 has no messages among its keys \['text'\]; give \"messages\""),
        ([{"messages": CHAT, "prompt": CHAT}], ValueError, r"conversation 0 has \['messages', 'prompt'\] among"),
        ([[BOT]], ValueError, "conversation 0 begins with its answer"),
        ([[{"role": "user", "content": 5}, BOT]], TypeError, "conversation 0 has the content 5; give a text, or"),
        ([[{"role": "user"}, BOT]], TypeError, "conversation 0 has the content None"),
        ([[{"role": "user", "content": ["Hi"]}, BOT]], TypeError, r"conversation 0 has the content \['Hi'\]"),
        ([[{"role": "user", "content": [{"type": "image"}]}, BOT]], ValueError, "has the part {'type': 'image'}; a"),
        ([CHAT, [USER]], ValueError, "conversation 1 has no response: its last message is by 'user'; end it with"),
        ([{"prompt": [USER], "completion": "Yo", "response": "Yo"}], ValueError, "conversation 0 has more than one"),
        ([{"messages": CHAT, "response": "Yo"}], ValueError, r"more than one answer, \['response'\] and its messages"),
    ],
)
def test_what_is_no_conversation_is_refused(conversations, error, message) -> None:
    """Everything that would be misread is an error that names the conversation and the remedy."""
    with pytest.raises(error, match=message):
        ControlSet.from_messages(TOKENIZER, conversations)


@pytest.mark.parametrize(
    ("conversations", "responses", "model", "error", "message"),
    [
        ([[USER]], ["Yo"], 1, ValueError, "responses= and model= both give the responses; leave out one of them"),
        ([[USER], CHAT], ["Yo", "So"], None, ValueError, "conversation 1 ends with an .* and responses= gives another"),
        ([[USER], CHAT], None, 1, ValueError, "conversation 1 ends with an assistant message.* and model= gives an"),
        ([[USER]], ["Yo", "So"], None, ValueError, "1 conversations but 2 responses; give each of them one"),
        ([[USER]], "Yo", None, TypeError, "responses='Yo' is one text; give a list of texts"),
        ([[USER]], [5], None, TypeError, "the response of prompt 0 is 5; give its text"),
    ],
)
def test_one_response_for_each(conversations, responses, model, error, message) -> None:
    """Two responses for a conversation, or none, are an error."""
    with pytest.raises(error, match=message):
        ControlSet.from_messages(TOKENIZER, conversations, responses, model=model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", '[]\n{"messages"', r"line 2 of .*c\.jsonl is no JSON"),
        ("c.json", "[", r"c\.json is no JSON"),
        ("c.json", '{"messages": []}', r"c\.json holds {'messages': \[\]}; give a list of conversations, or a \.jsonl"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message) -> None:
    """The file and the line are named."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        ControlSet.from_messages(TOKENIZER, tmp_path / name)
