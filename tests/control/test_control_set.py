"""ControlSet: ragged prompts and responses, slices, and the ways to make, cut, keep and redraw them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from step_optim import ControlSet
from step_optim.host.rng import RNGState
from step_optim.snapshot.tensors import same_bits
from tests.models import VOCAB, control_sets, ragged_control, tiny_gpt2, tiny_llama

WORDS = ["[UNK]", "<s>", "<user>", "<end>", "<bot>", "what", "is", "two", "plus", "four", "hello", "world", "yes", "no"]


@pytest.fixture(scope="module")
def tokenizer():
    """A word-level tokenizer that adds <s> to plain texts, with a chat template that adds its own."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", bos_token="<s>", pad_token="[UNK]"
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %} <user> {{ m['content'] }} <end>{% endfor %}"
        "{% if add_generation_prompt %} <bot>{% endif %}"
    )
    return fast


def words(ids) -> str:
    """Ids back to text."""
    return " ".join(WORDS[i] for i in ids)


def same(a: ControlSet, b: ControlSet) -> bool:
    """Whether two control sets hold the same ids and slices."""
    pairs = zip((*a.prompts, *a.responses), (*b.prompts, *b.responses), strict=True)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in pairs) and dict(a.slices) == dict(b.slices)


def test_from_texts(tokenizer) -> None:
    """Prompts get the tokenizer's special tokens, responses get none, and slices are kept by index."""
    control = ControlSet.from_texts(
        tokenizer, ["what is two", "hello"], ["four", "hello world yes"], slices={"math": [0], "talk": [1]}
    )
    assert [words(p) for p in control.prompts] == ["<s> what is two", "<s> hello"]
    assert [words(r) for r in control.responses] == ["four", "hello world yes"]
    assert control.slices == {"math": (0,), "talk": (1,)}
    assert control.prompts[0].dtype == torch.int64


def test_from_texts_with_chat_messages(tokenizer) -> None:
    """Chat prompts go through the template once: one <s>, and the generation prompt at the end."""
    chat = [{"role": "user", "content": "what is two plus two"}]
    control = ControlSet.from_texts(tokenizer, [chat, "hello"], ["four", "world"])
    assert words(control.prompts[0]) == "<s> <user> what is two plus two <end> <bot>"
    assert words(control.prompts[1]) == "<s> hello"


def test_from_texts_cuts_long_responses(tokenizer) -> None:
    """`max_response_tokens` keeps the beginning of a response."""
    control = ControlSet.from_texts(tokenizer, ["hello"], ["yes no yes no"], max_response_tokens=2)
    assert words(control.responses[0]) == "yes no"


def test_from_texts_takes_any_callable() -> None:
    """A tokenizer is any callable that returns input_ids."""

    def letters(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(c) - 96 for c in text]}

    control = ControlSet.from_texts(letters, ["ab"], ["c"])
    assert (control.prompts[0].tolist(), control.responses[0].tolist()) == ([0, 1, 2], [3])


def test_an_empty_response_text_is_refused_by_its_prompt(tokenizer) -> None:
    """A text without tokens is an error that names the prompt."""
    with pytest.raises(ValueError, match="response of prompt 1 has no tokens"):
        ControlSet.from_texts(tokenizer, ["hello", "hello"], ["yes", ""])


@given(control_sets())
def test_lengths(control) -> None:
    """`len` counts prompts, `response_tokens` response tokens."""
    assert len(control) == len(control.prompts) == len(control.responses)
    assert control.response_tokens == sum(response.numel() for response in control.responses)


@given(control_sets())
def test_from_ids_takes_tensors_and_lists(control) -> None:
    """Tensors of any integer type, lists and tuples of ids give the same control set."""
    again = ControlSet.from_ids(
        [prompt.int() for prompt in control.prompts], [tuple(r.tolist()) for r in control.responses], control.slices
    )
    assert same(control, again)


def test_a_control_set_does_not_follow_its_source() -> None:
    """Editing the ids that it was built from, or its mapping of slices, leaves a control set as it is."""
    prompt, slices = torch.tensor([1, 2]), {"a": [0]}
    control = ControlSet.from_ids([prompt], [[3]], slices)
    prompt.fill_(9)
    slices["a"].append(5)
    slices["b"] = [0]
    assert control.prompts[0].tolist() == [1, 2]
    assert dict(control.slices) == {"a": (0,)}


@given(control_sets())
def test_save_and_load(control) -> None:
    """A round trip through a file keeps everything, slice order included."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "control.json"
        control.save(path)
        loaded = ControlSet.load(path)
    assert same(control, loaded)
    assert list(control.slices) == list(loaded.slices)


def test_load_checks_what_it_reads(tmp_path) -> None:
    """A file that was edited into nonsense is refused as from_ids would."""
    path = tmp_path / "control.json"
    ragged_control().save(path)
    record = json.loads(path.read_text())
    record["responses"][2] = []
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="response of prompt 2 has no tokens"):
        ControlSet.load(path)


@given(control=control_sets(), data=st.data())
def test_select(control, data) -> None:
    """Selected prompts keep their ids and their slices, renumbered; slices that lose all prompts are gone."""
    kept = data.draw(st.lists(st.integers(0, len(control) - 1), min_size=1, unique=True))
    part = control.select(kept)
    assert [p.tolist() for p in part.prompts] == [control.prompts[i].tolist() for i in kept]
    assert [r.tolist() for r in part.responses] == [control.responses[i].tolist() for i in kept]
    for name, members in control.slices.items():
        wanted = {i for i in members if i in kept}
        assert {kept[i] for i in part.slices.get(name, ())} == wanted
        assert (name in part.slices) == bool(wanted)


@given(count=st.integers(2, 12), held_out=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_split_by_fraction(count, held_out, seed) -> None:
    """The two parts share no prompt, leave none out, are as large as asked, and repeat with the seed."""
    control = ControlSet.from_ids([[i] for i in range(count)], [[i] for i in range(count)])
    kept, out = control.split(held_out, seed=seed)
    assert sorted(int(p) for part in (kept, out) for p in part.prompts) == list(range(count))
    assert len(kept) >= 1
    assert len(out) == min(max(1, round(held_out * count)), count - 1)
    again = control.split(held_out, seed=seed)
    assert same(kept, again[0])
    assert same(out, again[1])


def test_split_reaches_prompts_without_a_slice() -> None:
    """Where slices do not cover the set, the rest is split in the same proportion."""
    control = ControlSet.from_ids([[i] for i in range(10)], [[i] for i in range(10)], {"a": [0, 1]})
    kept, out = control.split(0.5)
    assert len(out) == len(kept) == 5


@given(sizes=st.lists(st.integers(2, 6), min_size=1, max_size=4), held_out=st.floats(0.01, 0.99))
def test_split_of_a_partition_keeps_every_slice_on_both_sides(sizes, held_out) -> None:
    """Where slices do not overlap, each with two prompts or more is found in both parts, near its fraction."""
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    slices = {f"s{i}": list(range(bounds[i], bounds[i + 1])) for i in range(len(sizes))}
    count = bounds[-1]
    control = ControlSet.from_ids([[i] for i in range(count)], [[i] for i in range(count)], slices)
    kept, out = control.split(held_out)
    assert set(kept.slices) == set(out.slices) == set(slices)
    for name, size in zip(slices, sizes, strict=True):
        assert len(kept.slices[name]) + len(out.slices[name]) == size
        assert abs(len(out.slices[name]) - held_out * size) <= 1
    assert not {p.item() for p in kept.prompts} & {p.item() for p in out.prompts}


def test_split_of_overlapping_slices_keeps_what_it_promises() -> None:
    """Where slices overlap and a fair split exists, both parts keep a prompt of every slice that has two."""
    slices = {"a": [0, 1], "b": [2, 3], "c": [0, 2]}  # {0, 3} and {1, 2} are fair
    control = ControlSet.from_ids([[i] for i in range(4)], [[i] for i in range(4)], slices)
    for seed in range(8):
        kept, out = control.split(0.5, seed=seed)
        assert set(kept.slices) == set(out.slices) == set(slices)


@given(seed=st.integers(0, 99), held_out=st.sampled_from([0.3, 0.5, 0.8]), labelled=st.booleans())
def test_a_prompt_with_two_responses_is_in_one_part(seed, held_out, labelled) -> None:
    """In whichever slices they are; a split by hand that tears them is refused."""
    prompts = [[1], [2], [3], [1], [2], [4]]
    slices = ["a", "a", "b", "b", "b", "a"] if labelled else None
    control = ControlSet.from_ids(prompts, [[i + 5] for i in range(6)], slices)
    parts = control.split(held_out, seed=seed)
    first, second = ({tuple(prompt.tolist()) for prompt in part.prompts} for part in parts)
    assert not first & second
    assert sum(map(len, parts)) == 6
    assert len(control.split([0, 3])[1]) == 2
    with pytest.raises(ValueError, match="puts one prompt into both parts: 0 and 3 are the same"):
        control.split([3])


def test_split_by_indices_and_by_names() -> None:
    """Indices and slice names say exactly what is held out."""
    kept, out = ragged_control().split([3, 0])
    assert [p.tolist() for p in out.prompts] == [[3, 4, 5], [9, 10, 11, 12, 13]]
    assert dict(kept.slices) == {"early": (0,), "late": (0, 1)}
    kept, out = ragged_control().split(["early"])
    assert len(out) == len(kept) == 2
    assert dict(kept.slices) == {"late": (0, 1)}
    assert dict(out.slices) == {"early": (0, 1), "late": (1,)}


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (0.0, "between 0 and 1"),
        (1.0, "between 0 and 1"),
        (float("nan"), "between 0 and 1"),
        (["early", "nobody"], "unknown slices .'nobody'.*known slices: .'early', 'late'"),
        ([4], "held_out holds 4.*0 to 3"),
        ([], "leaves one part of 4 prompts empty"),
        ([0, 1, 2, 3], "leaves one part of 4 prompts empty"),
        (["early", "late"], "leaves one part of 4 prompts empty"),
    ],
)
def test_impossible_splits(held_out, message) -> None:
    """What cannot be held out is refused with the value."""
    with pytest.raises(ValueError, match=message):
        ragged_control().split(held_out)


def test_to_another_device() -> None:
    """`to` moves all tensors and keeps the slices."""
    control = ragged_control()
    moved = control.to("meta")
    assert moved.device == torch.device("meta")
    assert {t.device.type for t in (*moved.prompts, *moved.responses)} == {"meta"}
    assert moved.slices == control.slices
    assert control.device == torch.device("cpu")


@pytest.mark.parametrize("host", ["meta", "cpu"])
def test_a_default_device_changes_nothing(host, tmp_path, tokenizer) -> None:
    """Under a default device, what is made, split, loaded and compared is what it is without one."""

    def made() -> list[ControlSet]:
        texts = ControlSet.from_texts(tokenizer, ["what is", "hello"], ["two", "world"], {"a": [0], "b": [1]})
        ids = ControlSet.from_ids([[1, 2], np.array([3])], [(4,), range(5, 7)], ["a", "b"], vocab_size=7)
        ragged_control().save(tmp_path / "control.json")
        return [texts, ids, ControlSet.load(tmp_path / "control.json"), *ragged_control().split(0.5)]

    expected = made()
    with torch.device(host):
        found = made()
    assert found == expected
    assert {control.device.type for control in found} == {"cpu"}


def test_tensors_stay_where_they_are_unless_a_device_is_given() -> None:
    """The first tensor says where a set lives, plain lists follow it; tensors without values are refused."""
    assert ControlSet.from_ids([[1]], [torch.tensor([2])]).device == torch.device("cpu")
    assert ControlSet.from_ids([[1]], [[2]], device="meta").device == torch.device("meta")
    with pytest.raises(ValueError, match="prompt 0 is a tensor on the meta device, which holds no token ids"):
        ControlSet.from_ids([torch.tensor([1], device="meta")], [[2]])


def test_from_ids_takes_what_a_tokenizer_returns(tokenizer) -> None:
    """A batch of a tokenizer is its ids without the padding; so are its encodings one by one."""
    prompts, responses = ["what is two plus two", "hello"], ["four", "world yes"]
    expected = ControlSet.from_ids([tokenizer(p)["input_ids"] for p in prompts], [[1, 9], [1, 11, 12]])
    for options in ({}, {"padding": True}, {"padding": True, "return_tensors": "pt"}):
        assert ControlSet.from_ids(tokenizer(prompts, **options), tokenizer(responses, **options)) == expected
    assert ControlSet.from_ids([tokenizer(p) for p in prompts], [tokenizer(r) for r in responses]) == expected


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([1, 2], TypeError, r"prompts=\[1, 2\] is one list of token ids; give one for each prompt"),
        (torch.tensor([1, 2]), TypeError, "prompts=.* is one list of token ids"),
        (np.array([1, 2]), TypeError, "prompts=.* is one list of token ids"),
        ({"input_ids": [1, 2]}, TypeError, r"prompts=\[1, 2\] is one list of token ids"),
        ("what", TypeError, "prompts='what' is no list; give one list of token ids for each prompt"),
        ({"a": [[1]]}, TypeError, "prompts=.* is no list"),
        (5, TypeError, "prompts=5 is no list"),
        (torch.tensor(5), TypeError, "prompts=.* is no list"),
        (["what", "is"], TypeError, r"prompt 0 is the text 'what'; give token ids, or use ControlSet.from_texts"),
        ([[1], None], TypeError, "prompt 1 must be a flat list of token ids, not None"),
        ([[1], ["what"]], TypeError, r"prompt 1 must be a flat list of token ids, not \['what'\]"),
        ([[1], [[2, 3]]], ValueError, r"prompt 1 must be a flat list of token ids, not \(1, 2\) of torch.int64"),
        ([[1], [2.0]], ValueError, "prompt 1 must be a flat list of token ids, not .* of torch.float32"),
    ],
)
def test_what_is_no_list_of_ids_is_refused(prompts, error, message) -> None:
    """Flat lists, texts and nested lists are errors that show them, for prompts and for responses."""
    with pytest.raises(error, match=message):
        ControlSet.from_ids(prompts, [[1], [2]])
    with pytest.raises(
        error, match=message.replace("prompts=", "responses=").replace("prompt ", "the response of prompt ")
    ):
        ControlSet.from_ids([[1], [2]], prompts)


@given(control=control_sets())
def test_ids_in_every_container(control) -> None:
    """Generators, tuples, arrays of any integer type, and ranges hold the same ids as lists."""
    prompts = tuple(np.array(p, dtype=np.uint16) for p in control.prompts)
    responses = ((int(token) for token in r) for r in control.responses)
    assert ControlSet.from_ids(prompts, responses, control.slices) == control


@given(control=control_sets())
def test_equality_and_repr(control) -> None:
    """Equal content is equal and hashes alike; one other id or slice is not; the repr is one short line of counts."""
    again = ControlSet.from_ids(control.prompts, control.responses, control.slices)
    assert control == again
    assert hash(control) == hash(again)
    other = (control.responses[0] + 1, *control.responses[1:])
    assert control != ControlSet.from_ids(control.prompts, other, control.slices)
    assert control != ControlSet.from_ids(control.prompts, control.responses, {"new": [0]})
    assert control != "control"
    assert "\n" not in repr(control)
    assert f"({len(control)} prompts, {control.response_tokens} response tokens, slices={{" in repr(control)
    assert "device='meta'" in repr(control.to("meta"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("my thesis", "is no JSON .*; give the file that ControlSet.save wrote"),
        ("[" * 100_000, "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        ("{}", r"is no control set: it has no \['prompts', 'responses', 'slices'\]"),
        ("[1, 2]", "is no control set"),
        ("null", "is no control set"),
        ('{"prompts": [[1]], "slices": {}}', r"is no control set: it has no \['responses'\]"),
        ('{"prompts": 5, "responses": [[1]], "slices": {}}', "holds no valid control set: prompts=5 is no list"),
        ('{"prompts": [[1]], "responses": [[1]], "slices": 5}', "holds no valid control set: slices=5"),
        (
            '{"prompts": [[1]], "responses": [["x"]], "slices": {}}',
            "holds no valid control set: the response of prompt 0",
        ),
    ],
)
def test_load_of_another_file(tmp_path, content, message) -> None:
    """A file that is no control set is refused with its path and what it lacks."""
    path = tmp_path / "other.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"other\.json {message}"):
        ControlSet.load(path)


def test_load_of_no_file(tmp_path) -> None:
    """A missing file and a directory are told apart."""
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.json"):
        ControlSet.load(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="is a directory; give the file"):
        ControlSet.load(tmp_path)


def test_a_tilde_in_a_path_is_the_home_directory(tmp_path, monkeypatch) -> None:
    """`~` is spelt out when saving and loading; a name that only begins with a tilde stays."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ragged_control().save("~/control.json")
    assert (tmp_path / "control.json").is_file()
    assert ControlSet.load(Path("~/control.json")) == ragged_control()
    ragged_control().save("~control.json")
    assert ControlSet.load(tmp_path / "~control.json") == ragged_control()


def test_from_ids_on_a_device() -> None:
    """`device=` places the tensors, and a set on another device can still be moved back to its ids."""
    control = ControlSet.from_ids([torch.tensor([1])], [[2, 3]], device="cpu")
    assert control.device == torch.device("cpu")


@given(control=control_sets(), extra=st.integers(0, 5))
def test_vocabulary_check_names_the_prompt(control, extra) -> None:
    """The first prompt with an id outside the vocabulary is named with that id; the exact size passes."""
    largest = [int(torch.cat([p, r]).max()) for p, r in zip(control.prompts, control.responses, strict=True)]
    control.check_vocabulary(max(largest) + 1 + extra)
    first = next(i for i, top in enumerate(largest) if top == max(largest))
    with pytest.raises(ValueError, match=f"prompt {first} of the control set has token id {max(largest)}, outside"):
        control.check_vocabulary(max(largest))


def test_resample_draws_from_the_model_and_leaves_no_trace() -> None:
    """Fresh responses for the same prompts and slices; flags and all random streams are as before."""
    control, model = ragged_control(), tiny_llama()
    model.generation_config.eos_token_id = None
    model.train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    before, python = RNGState.capture(), random.getstate()
    drawn = control.resample(model, max_new_tokens=3, seed=4)
    assert [module.training for module in model.modules()] == modes
    assert same_bits(RNGState.capture().torch_cpu, before.torch_cpu)
    assert random.getstate() == python
    assert all(torch.equal(a, b) for a, b in zip(drawn.prompts, control.prompts, strict=True))
    assert drawn.slices == control.slices
    assert [len(response) for response in drawn.responses] == [3, 3, 3, 3]
    assert same(drawn, control.resample(model, max_new_tokens=3, seed=4))
    assert not same(drawn, control.resample(model, max_new_tokens=3, seed=5))


def test_resample_keeps_the_end_of_sequence_token() -> None:
    """A response that the model ends early is shorter, and its last token is the end itself."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform: the end comes soon
    model.generation_config.eos_token_id = list(range(0, VOCAB, 2))
    drawn = ragged_control().resample(model, max_new_tokens=12)
    lengths = [len(response) for response in drawn.responses]
    assert min(lengths) < 12
    for response in drawn.responses:
        assert all(token % 2 for token in response[:-1].tolist())
        assert len(response) == 12 or response[-1] % 2 == 0


def test_resample_samples_the_policy() -> None:
    """At a tiny temperature the draw is the model's own greedy continuation, dropout off."""
    control, model = ragged_control(), tiny_gpt2(dropout=0.5).train()
    model.generation_config.eos_token_id = None
    drawn = control.resample(model, max_new_tokens=2, temperature=1e-4)
    model.eval()
    for prompt, response in zip(control.prompts, drawn.responses, strict=True):
        text = prompt
        for token in response.tolist():
            assert int(model(text[None]).logits[0, -1].argmax()) == token
            text = torch.cat([text, torch.tensor([token])])


def test_resample_needs_a_model_that_generates() -> None:
    """Anything without generate() is refused by its type."""
    with pytest.raises(TypeError, match=r"generate\(\), not Linear"):
        ragged_control().resample(torch.nn.Linear(2, 2))
