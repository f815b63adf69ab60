"""From texts to ids: where the response begins, whatever the tokenizer adds, and what is no list of texts."""

import re

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from step_optim import ControlSet
from tests.templates import IN_PARTS, STYLES, byte_tokenizer

WORDS = ["<s>", "</s>", "<unk>", "<user>", "<bot>", "what", "is", "two", "plus", "four"]
TEMPLATES = ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A </s> </s>", "<user> $A <bot> </s>"]


def tokenizer(template: str, words: list[str] = WORDS) -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer that puts special tokens around a text as the template says."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, i) for i, word in enumerate(words) if word in template]
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def words(ids) -> str:
    """Ids back to text."""
    return " ".join(WORDS[i] for i in ids)


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)


@given(template=st.sampled_from(TEMPLATES), prompts=st.lists(texts, min_size=1, max_size=4))
def test_a_response_follows_its_prompt_as_at_generation(template, prompts) -> None:
    """A prompt is what the template puts before the text, then the text itself, specials in it included."""
    before = template[: template.index("$A")].split()
    control = ControlSet.from_texts(tokenizer(template), prompts, ["is four"] * len(prompts))
    for text, ids, response in zip(prompts, control.prompts, control.responses, strict=True):
        assert words(ids).split() == before + text.split()
        assert words(response) == "is four"


def test_an_empty_prompt_keeps_what_stands_before_it() -> None:
    """A text without tokens is prompted with the beginning of sequence alone."""
    control = ControlSet.from_texts(tokenizer("<s> $A </s>"), [""], ["four"])
    assert words(control.prompts[0]) == "<s>"


def test_bert_keeps_its_first_special_token_and_loses_its_last() -> None:
    """[CLS] stays, [SEP] goes."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "four"]
    bert = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
    control = ControlSet.from_texts(bert, ["what"], ["four"])
    assert [vocabulary[i] for i in control.prompts[0]] == ["[CLS]", "what"]


class InPieces:
    """Puts 9 behind every word and 1 behind the text: the text's own tokens are no contiguous part."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """Read a text of digits."""
        plain = [int(c) for c in text]
        spread = [token for word in plain for token in (word, 9)][:-1]
        return {"input_ids": [0, *spread, 1] if add_special_tokens else plain}


def test_special_tokens_within_a_text() -> None:
    """What stands behind the last token of the text is left out, also if specials stand between its tokens."""
    control = ControlSet.from_texts(InPieces(), ["234", "5"], ["6", "7"])
    assert [ids.tolist() for ids in control.prompts] == [[0, 2, 9, 3, 9, 4], [0, 5]]


class Renaming:
    """Reads every word as another token where special tokens are added."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        """Read a text of digits."""
        return {"input_ids": [0, *(int(c) + 10 for c in text), 1] if add_special_tokens else [int(c) for c in text]}


def test_a_tokenizer_that_cannot_be_understood_is_refused() -> None:
    """If the text is not found among its own ids, it cannot be told what was appended."""
    with pytest.raises(ValueError, match=r"'23' as other tokens when it adds special tokens.*ControlSet\.from_ids"):
        ControlSet.from_texts(Renaming(), ["23"], ["4"])


def test_a_tokenizer_that_adds_nothing_and_ignores_the_flag() -> None:
    """A callable that knows no special tokens reads prompts and responses alike; arrays and tensors are ids, too."""

    def letters(text: str, **_) -> dict[str, np.ndarray]:
        return {"input_ids": np.array([ord(c) - 97 for c in text])}

    control = ControlSet.from_texts(letters, ["ab"], ["c"])
    assert (control.prompts[0].tolist(), control.responses[0].tolist()) == ([0, 1], [2])


def test_a_tokenizer_that_returns_batches_is_refused() -> None:
    """Nested ids for one text are an error that shows them."""
    with pytest.raises(ValueError, match=r"the tokenizer gives \[\[1, 2\]\] for one text; it must be a flat list"):
        ControlSet.from_texts(lambda text, add_special_tokens: {"input_ids": [[1, 2]]}, ["a"], ["b"])


class ProcessorMixin:
    """Stands for the base class of processors."""


class Processor(ProcessorMixin):
    """Holds a tokenizer; its own first argument is a picture."""

    def __init__(self, inner, chat_template: str | None = None) -> None:
        self.tokenizer, self.chat_template = inner, chat_template

    def __call__(self, images=None, text=None, **kwargs) -> None:
        """Refuse a text in the place of a picture."""
        raise AssertionError("a text was taken for a picture")

    def apply_chat_template(self, conversation, **options) -> str:
        """Render a conversation."""
        assert options == {"tokenize": False, "add_generation_prompt": True}
        return " ".join(["<s>", *(f"<user> {m['content']}" for m in conversation), "<bot>"])


def test_a_processor_in_the_place_of_the_tokenizer() -> None:
    """Its tokenizer reads the texts, and its chat template the conversations if the tokenizer has none."""
    chat = [{"role": "user", "content": "what is two"}]
    control = ControlSet.from_texts(Processor(tokenizer("<s> $A </s>"), "its own"), ["what is", chat], ["two", "four"])
    assert [words(ids) for ids in control.prompts] == ["<s> what is", "<s> <user> what is two <bot>"]


def test_a_real_processor() -> None:
    """A LLaVA processor works as its tokenizer does."""
    inner = tokenizer("<s> $A", [*WORDS, "<image>"])
    images = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
    processor = transformers.LlavaProcessor(
        image_processor=images, tokenizer=inner, patch_size=14, vision_feature_select_strategy="default"
    )
    prompts, responses = ["what is two", "two plus two"], ["two", "four"]
    assert ControlSet.from_texts(processor, prompts, responses) == ControlSet.from_texts(inner, prompts, responses)


def test_a_wrapper_with_a_tokenizer_inside_is_called_itself() -> None:
    """A callable of one's own that happens to hold a tokenizer is no processor."""

    class Wrapper:
        tokenizer = staticmethod(lambda *_, **__: {"input_ids": [9, 9]})

        def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [1, 2]}

    assert ControlSet.from_texts(Wrapper(), ["a"], ["b"]).prompts[0].tolist() == [1, 2]


CHAT = [{"role": "user", "content": "what"}]


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ("what", "four", r"prompts='what' is one text; give a list of texts, prompts=\['what'\]"),
        (["what"], "four", r"responses='four' is one text; give a list of texts, responses=\['four'\]"),
        (b"what", ["four"], "prompts=b'what' is no list"),
        ({"what": 1}, ["four"], "prompts={'what': 1} is no list"),
        ({"what", "is"}, ["four", "four"], "prompts=.* is no list; give one text for each prompt, in order"),
        (None, ["four"], "prompts=None is no list"),
        (np.array("what"), ["four"], "prompts=.*is no list"),
        (CHAT, ["four"], r"prompt 0 is one chat message.*put a single conversation into a list, prompts=\[\[{"),
        (["what", 5], ["four"] * 2, "prompt 1 is 5; give a text"),
        (["what", []], ["four"] * 2, r"prompt 1 is \[\]; give a text"),
        (["what", [3, 4]], ["four"] * 2, r"prompt 1 is \[3, 4\].*token ids go to ControlSet.from_ids"),
        (["what"], [None], "the response of prompt 0 is None; give its text"),
        (["what"], [CHAT], "the response of prompt 0 is .*; give its text"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(prompts, responses, message) -> None:
    """Everything that would be read letter by letter, or not at all, is refused with the argument and the remedy."""
    with pytest.raises(TypeError, match=message):
        ControlSet.from_texts(tokenizer("<s> $A"), prompts, responses)


@pytest.mark.parametrize("made", [tuple, iter, np.array, lambda texts: (text for text in texts)])
def test_lists_of_texts_of_every_kind(made) -> None:
    """Tuples, arrays, iterators and generators of texts are lists of texts."""
    control = ControlSet.from_texts(tokenizer("<s> $A"), made(["what", "is two"]), made(["four", "two"]))
    assert [words(ids) for ids in control.prompts] == ["<s> what", "<s> is two"]
    assert [words(ids) for ids in control.responses] == ["four", "two"]


def test_a_tokenizer_by_name_is_refused() -> None:
    """A name is not a tokenizer; the message says how to get one."""
    with pytest.raises(TypeError, match=re.escape("tokenizer='gpt2' is not callable; give AutoTokenizer.from_pretr")):
        ControlSet.from_texts("gpt2", ["a"], ["b"])


def test_chat_messages_without_a_template_are_refused() -> None:
    """A plain callable cannot read conversations."""
    with pytest.raises(TypeError, match=r"list of chat messages, but function has no apply_chat_template"):
        ControlSet.from_texts(lambda text, add_special_tokens: {"input_ids": [1]}, [CHAT], ["b"])


def test_the_end_of_a_turn() -> None:
    """If asked for, a text is ended by the end of the sequence, and an answer in a chat as the template ends it."""
    chatml = STYLES["chatml"].tokenizer()
    prompts = ["Hi", [{"role": "user", "content": "Hi"}]]
    for asked, ends in ((False, ("", "")), (True, ("<|endoftext|>", "<|im_end|>"))):
        control = ControlSet.from_texts(chatml, prompts, ["Yo", "Yo"], end_of_turn=asked)
        assert [response for _, response in control.decode(chatml)] == [f"Yo{end}" for end in ends]


@pytest.mark.parametrize("name", STYLES)
def test_the_end_of_a_turn_is_that_of_the_template(name) -> None:
    """In every style; a response that has it already gets no second one; a cut takes it away."""
    style, tokenizer = STYLES[name], STYLES[name].tokenizer()
    chats = [[{"role": "user", "content": "Hi"}]] * 3
    control = ControlSet.from_texts(tokenizer, chats, ["Yo", f"Yo{style.end}", ""], end_of_turn=True)
    assert control.decode(tokenizer) == [(style.prompt, said + style.end) for said in ("Yo", "Yo", "")]
    cut = ControlSet.from_texts(tokenizer, chats[:1], ["Yo"], end_of_turn=True, max_response_tokens=2)
    assert cut.decode(tokenizer)[0][1] == "Yo"


def test_no_end_of_a_turn() -> None:
    """A tokenizer without one is refused if it is asked for, whatever the prompt is."""
    chat = [{"role": "user", "content": "Hi"}]
    for prompt, reader in (("Hi", lambda text, **_: {"input_ids": [1]}), (chat, byte_tokenizer("{{ messages }}"))):
        with pytest.raises(ValueError, match=r"no token ends the response of prompt 0; the tokenizer has no eos_token"):
            ControlSet.from_texts(reader, [prompt], ["Yo"], end_of_turn=True)


def test_a_template_that_leaves_the_prompt_out_is_refused() -> None:
    """A template that takes parts makes nothing of a text, and the other way round."""
    for template, content, form in ((IN_PARTS, "Hi", "parts"), ("{{ messages[0].role }}", [{"text": "Hi"}], "a text")):
        with pytest.raises(ValueError, match=f"leaves out the content of a message; it may want it as {form}"):
            ControlSet.from_texts(byte_tokenizer(template), [[{"role": "user", "content": content}]], ["Yo"])


@pytest.mark.parametrize("cut", [0, -1])
def test_a_cut_that_leaves_nothing_is_refused(cut) -> None:
    """Responses keep a token at least."""
    with pytest.raises(ValueError, match=f"max_response_tokens={cut} must be at least 1"):
        ControlSet.from_texts(tokenizer("$A"), ["what"], ["four"], max_response_tokens=cut)
