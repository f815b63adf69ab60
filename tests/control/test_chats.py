"""Conversations to ids: where an answer begins and which token ends it, whatever the chat template's style."""

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from step_optim import ControlSet
from tests.models import tiny_llama
from tests.templates import IN_PARTS, STYLES, WITH_TOOLS, byte_tokenizer

USER = {"role": "user", "content": "Hi"}
CHAT = [USER, {"role": "assistant", "content": "Yo"}]
TOKENIZERS = {name: style.tokenizer() for name, style in STYLES.items()}
PLAIN = ("thinking, asked for", "headings")
"""Styles in which an answer is read as plain text: another place than was asked for, and no end."""

CHATML = ("<|im_start|>", "<|im_end|>")
PRINTED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that prints what a content is."""

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]

styles = st.sampled_from(sorted(STYLES))
texts = st.text(st.sampled_from("aé \n.雨"), min_size=1, max_size=8).map(lambda text: text + "x")


def turns(*contents: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def written(tokenizer, messages, **options) -> str:
    """What the template itself writes."""
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("name", STYLES)
def test_every_style(name) -> None:
    """Prompt and response are as written out by hand for each of them, with the end of the turn and without it."""
    style, tokenizer = STYLES[name], TOKENIZERS[name]
    assert ControlSet.from_messages(tokenizer, [CHAT]).decode(tokenizer) == [(style.prompt, style.response)]
    without = ControlSet.from_messages(tokenizer, [CHAT], end_of_turn=False)
    assert without.decode(tokenizer) == [(style.prompt, style.response.removesuffix(style.end))]


@given(name=styles, contents=st.lists(texts, min_size=3, max_size=5))
def test_an_answer_is_what_the_template_writes_behind_the_prompt(name, contents) -> None:
    """In conversations of several turns, prompt and response are the template's own text up to the last end of turn."""
    tokenizer, end = TOKENIZERS[name], STYLES[name].end
    messages = turns(*contents)[: len(contents) // 2 * 2]
    before = written(tokenizer, messages[:-1], add_generation_prompt=True)
    if name in PLAIN:
        expected = messages[-1]["content"] + end
    else:
        whole = written(tokenizer, messages)
        expected = whole[len(before) : whole.rindex(end) + len(end)]
    assert ControlSet.from_messages(tokenizer, [messages]).decode(tokenizer) == [(before, expected)]


@given(name=styles, user=texts, said=texts)
def test_given_responses_are_the_answers_in_the_conversations(name, user, said) -> None:
    """A response given apart is what it would be as the last message."""
    tokenizer = TOKENIZERS[name]
    apart = ControlSet.from_messages(tokenizer, [turns(user)], [said])
    assert apart == ControlSet.from_messages(tokenizer, [turns(user, said)])


@given(name=styles, said=texts, limit=st.integers(1, 12))
def test_a_response_that_is_cut_has_no_end(name, said, limit) -> None:
    """The first tokens are kept, and the end among them only if all of them are."""
    tokenizer = TOKENIZERS[name]
    (whole,) = ControlSet.from_messages(tokenizer, [turns("Hi", said)]).responses
    (cut,) = ControlSet.from_messages(tokenizer, [turns("Hi", said)], max_response_tokens=limit).responses
    assert cut.tolist() == whole.tolist()[:limit]


def test_an_answer_that_begins_with_a_newline_is_read_from_there() -> None:
    """The prompt's ids stay what they are at generation, though a tokenizer reads its last newline otherwise."""
    tokenizer = TOKENIZERS["chatml"]
    control = ControlSet.from_messages(tokenizer, [turns("Hi", "\nYo"), turns("Hi", "Yo")])
    assert control.decode(tokenizer)[0] == (STYLES["chatml"].prompt, "\nYo<|im_end|>")
    assert control.prompts[0].tolist() == control.prompts[1].tolist()


def test_an_end_of_turn_that_is_no_special_token() -> None:
    """Where all that stands behind an answer is one token, this is its end; a text of several is none."""
    template = "{% for m in messages %}{{ m.content }}{{ MARK }}{% endfor %}"
    one, several = (
        byte_tokenizer(template.replace("MARK", f"'{mark}'"), ("</s>",), eos="</s>") for mark in ("#\n", "##\n")
    )
    assert ControlSet.from_messages(one, [CHAT]).decode(one) == [("Hi#\n", "Yo#")]
    assert ControlSet.from_messages(several, [CHAT]).decode(several) == [("Hi##\n", "Yo</s>")]


def test_an_unknown_word_is_no_end() -> None:
    """What the tokenizer cannot read behind an answer ends nothing."""
    core = Tokenizer(models.WordLevel({"?": 0, "Hi": 1, "Yo": 2, "</s>": 3}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} so what {% endfor %}"
    assert ControlSet.from_messages(tokenizer, [CHAT]).responses[0].tolist() == [2, 3]


def test_without_any_end() -> None:
    """Where neither the template nor the tokenizer has one, the message says so; without an end it is no matter."""
    tokenizer = byte_tokenizer(STYLES["headings"].template)
    with pytest.raises(ValueError, match=r"no token after the answer of conversation 0, and the tokenizer has no eos"):
        ControlSet.from_messages(tokenizer, [CHAT])
    without = ControlSet.from_messages(tokenizer, [CHAT], end_of_turn=False)
    assert without.decode(tokenizer) == [(STYLES["headings"].prompt, "Yo")]


def test_an_empty_answer_is_its_end_alone() -> None:
    """A policy may end its turn at once; without the end there is no response."""
    tokenizer = TOKENIZERS["chatml"]
    assert ControlSet.from_messages(tokenizer, [turns("Hi", "")]).decode(tokenizer)[0][1] == "<|im_end|>"
    with pytest.raises(ValueError, match="the response of prompt 0 has no tokens"):
        ControlSet.from_messages(tokenizer, [turns("Hi", "")], end_of_turn=False)
    with pytest.raises(ValueError, match=r"answer of conversation 0 is not found .* an empty answer cannot be read as"):
        ControlSet.from_messages(TOKENIZERS["thinking, asked for"], [turns("Hi", "")])


def test_system_prompts_and_tools() -> None:
    """They are written where the template puts them; an answer may be a call."""
    tokenizer = byte_tokenizer(WITH_TOOLS, ("<|im_start|>", "<|im_end|>"))
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}
    messages = [{"role": "system", "content": "Be brief."}, USER, call]
    ((prompt, response),) = ControlSet.from_messages(tokenizer, [messages], tools=TOOLS).decode(tokenizer)
    assert prompt == written(tokenizer, messages[:-1], tools=TOOLS, add_generation_prompt=True)
    assert prompt.startswith('<|im_start|>tools\n[{"type": "function"')
    assert response == '<call>{"name": "look", "arguments": {}}</call><|im_end|>'
    spoken = [*messages[:-1], {**call, "content": "Looking"}]
    assert ControlSet.from_messages(tokenizer, [spoken], tools=TOOLS).decode(tokenizer) == [(prompt, response)]


def test_a_call_that_cannot_be_found_is_refused() -> None:
    """Where the answer is read as plain text, a call would be lost."""
    call = {"role": "assistant", "content": "Yo", "tool_calls": [{"function": {"name": "look"}}]}
    with pytest.raises(ValueError, match=r"conversation 1 .*the chat template leaves out the call of 'look'"):
        ControlSet.from_messages(TOKENIZERS["thinking, asked for"], [CHAT, [USER, call]])


@pytest.mark.parametrize("content", ["Yo", "", None])
@pytest.mark.parametrize("form", [{"function": {"name": "look"}}, {"name": "look"}])
def test_a_call_that_no_template_writes_is_refused(content, form) -> None:
    """Beside a text or alone: an answer without it would be measured, in silence."""
    call = {"role": "assistant", "content": content, "tool_calls": [form]}
    with pytest.raises(ValueError, match="the chat template leaves out the call of 'look'"):
        ControlSet.from_messages(byte_tokenizer(PRINTED, CHATML), [[USER, call]])


def test_what_a_template_leaves_out_is_told_of() -> None:
    """A system message, and tools: the model is not told either."""
    quiet = PRINTED.replace("in messages", "in messages if m.role != 'system'")
    tokenizer = byte_tokenizer(quiet, CHATML)
    with pytest.warns(UserWarning, match="leaves out the system message 'Be brief'"):
        ControlSet.from_messages(tokenizer, [[{"role": "system", "content": "Be brief"}, *CHAT]])
    with pytest.warns(UserWarning, match=r"writes nothing of tools=\['look'\]"):
        ControlSet.from_messages(tokenizer, [CHAT], tools=TOOLS)


@pytest.mark.parametrize("user", ["Hi", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]])
@pytest.mark.parametrize("said", ["Yo", [{"type": "text", "text": "Yo"}]])
@pytest.mark.parametrize("name", [*STYLES, "printed"])
def test_contents_in_parts_become_texts_where_a_template_wants_those(name, user, said) -> None:
    """Whether it would print the list, or fail to add it to a text; also where only one message is in parts."""
    tokenizer = byte_tokenizer(PRINTED, CHATML) if name == "printed" else TOKENIZERS[name]
    chat = [{"role": "user", "content": user}, {"role": "assistant", "content": said}]
    found = ControlSet.from_messages(tokenizer, [chat])
    assert found == ControlSet.from_messages(tokenizer, [CHAT])
    assert ControlSet.from_texts(tokenizer, [chat[:1]], ["Yo"]).prompts[0].tolist() == found.prompts[0].tolist()


def test_no_parts_are_an_empty_text() -> None:
    tokenizer = byte_tokenizer(PRINTED, CHATML)
    chats = ([{"role": "user", "content": content}, CHAT[1]] for content in ([], ""))
    assert ControlSet.from_messages(tokenizer, [next(chats)]) == ControlSet.from_messages(tokenizer, [next(chats)])


def test_an_answer_that_has_its_end_in_the_text_has_one_end() -> None:
    """As `decode` returns them."""
    tokenizer = byte_tokenizer(PRINTED, CHATML)
    once = ControlSet.from_messages(tokenizer, [[USER]], ["Yo"])
    assert ControlSet.from_messages(tokenizer, [[USER]], [once.decode(tokenizer)[0][1]]) == once


def test_contents_in_parts() -> None:
    """A template that takes parts gets them, from a response given as text too; the other form is refused."""
    tokenizer = byte_tokenizer(IN_PARTS, ("<|im_start|>", "<|im_end|>"))
    user, said = ({"role": role, "content": [{"type": "text", "text": "Yo"}]} for role in ("user", "assistant"))
    expected = [("<|im_start|>user\nYo<|im_end|>\n<|im_start|>assistant\n", "Yo<|im_end|>")]
    assert ControlSet.from_messages(tokenizer, [[user, said]]).decode(tokenizer) == expected
    assert ControlSet.from_messages(tokenizer, [[user]], ["Yo"]).decode(tokenizer) == expected
    with pytest.raises(ValueError, match=r"conversation 0 does not go .*leaves out the content .* want it as parts"):
        ControlSet.from_messages(tokenizer, [CHAT])


def test_what_a_template_refuses_is_named() -> None:
    """The conversation, and what the template says; the same for a tokenizer without a template."""
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    with pytest.raises(ValueError, match=r"conversation 1 does not go through the chat template \(.*no system\)"):
        ControlSet.from_messages(TOKENIZERS["gemma"], [CHAT, system])
    with pytest.raises(ValueError, match=r"conversation 0 does not go .*chat_template"):
        ControlSet.from_messages(byte_tokenizer(), [CHAT])
    with pytest.raises(ValueError, match=r"conversation 0 does not go .*function has no apply_chat_template"):
        ControlSet.from_messages(lambda text, add_special_tokens: {"input_ids": [1]}, [CHAT])


def test_responses_from_a_model() -> None:
    """They are what `resample` draws for the same prompts, on the model's device; a slice of each as it is named."""
    tokenizer, model = TOKENIZERS["chatml"], tiny_llama(vocab=300)
    records = [{"messages": [USER], "slice": "a"}, {"messages": turns("Hi", "Yo", "So"), "slice": "b"}]
    told: list[tuple[int, int]] = []
    drawn = ControlSet.from_messages(
        tokenizer, records, model=model, max_new_tokens=4, seed=3, progress=lambda *c: told.append(c), temperature=2.0
    )
    fixed = ControlSet.from_messages(tokenizer, records, ["x", "x"])
    assert drawn == fixed.resample(model, max_new_tokens=4, seed=3, temperature=2.0)
    assert told == [(1, 2), (2, 2)]
    assert dict(drawn.slices) == {"a": (0,), "b": (1,)}


def test_slices_are_checked_before_the_draw() -> None:
    """A draw takes minutes: nothing that is wrong is found only behind it."""
    model = tiny_llama(vocab=300)
    model.generate = None
    with pytest.raises(ValueError, match="slice 'a' holds 1, but prompts are numbered 0 to 0"):
        ControlSet.from_messages(TOKENIZERS["chatml"], [[USER]], model=model, slices={"a": [1]})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 2.0}, TypeError, r"\['temperature'\] are arguments of a draw; give model="),
        ({"model": True, "end_of_turn": False}, ValueError, "end_of_turn=False with model=: a drawn response keeps"),
        ({"model": True, "max_response_tokens": 5}, ValueError, "max_response_tokens=5 with model=: use max_new_tok"),
        ({"model": True}, TypeError, r"responses are drawn from a model with generate\(\), not bool"),
        ({"max_response_tokens": 0, "responses": ["Yo"]}, ValueError, "max_response_tokens=0 must be at least 1"),
    ],
)
def test_arguments_without_effect_are_refused(options, error, message) -> None:
    """What a draw needs without a model, and what given responses need with one."""
    with pytest.raises(error, match=message):
        ControlSet.from_messages(TOKENIZERS["chatml"], [[USER]], **options)
