"""The control set that comes with the package: its prompts, how they are chosen, and who answers them."""

import itertools
import re
import sys
from importlib.resources import files
from pathlib import Path
from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import ControlSet
from step_optim.control.standard import PARTS, every_prompt, standard_prompts
from step_optim.host.rng import RNGState
from step_optim.snapshot.tensors import same_bits
from tests.models import tiny_llama
from tests.templates import IN_PARTS, STYLES, byte_tokenizer

SLICES = ["story", "fact", "math", "code", "format", "advice", "translation", "refusals"]
CHATML = STYLES["chatml"].tokenizer()
EVERY = [prompt for prompts in every_prompt().values() for prompt in prompts]


def model(seed: int = 0, **options):
    """A small policy over the bytes, which never ends a response unless it is told how."""
    made = tiny_llama(vocab=300, seed=seed)
    made.generation_config.eos_token_id = None
    return made


def words(prompt: str) -> set[str]:
    """Its words in small letters."""
    return set(re.findall(r"\w+", prompt.lower()))


def test_fifty_prompts_a_slice() -> None:
    """In eight slices, as the file has them."""
    assert {name: len(prompts) for name, prompts in every_prompt().items()} == dict.fromkeys(SLICES, 50)
    text = files("step_optim.control").joinpath("standard_prompts.txt").read_text(encoding="utf-8")
    headers = [f"# {name}" for name in SLICES]
    assert [line for line in text.splitlines() if line] == [
        line for header, name in zip(headers, SLICES, strict=True) for line in (header, *every_prompt()[name])
    ]


def test_prompts_are_short_and_no_two_alike() -> None:
    """A few words, without stray spaces; no two share most of their words."""
    for prompt in EVERY:
        assert 4 <= len(prompt.split()) <= 25, prompt
        assert prompt == " ".join(prompt.split())
    alike = [
        (a, b) for a, b in itertools.combinations(EVERY, 2) if len(words(a) & words(b)) > len(words(a) | words(b)) / 2
    ]
    assert alike == []


def test_no_prompt_depends_on_the_day() -> None:
    """What is asked has the same answer in every year."""
    for prompt in EVERY:
        assert not words(prompt) & {"today", "yesterday", "currently", "nowadays", "latest", "recent", "current"}, (
            prompt
        )


def test_the_parts_are_alike() -> None:
    """They share no prompt, make up the whole, and their prompts are about as long in every slice."""
    for name, prompts in every_prompt().items():
        parts = [prompts[lines] for lines in PARTS.values()]
        assert [len(part) for part in parts] == [16, 24, 10]
        assert sorted(itertools.chain(*parts)) == sorted(prompts)
        lengths = [mean(len(prompt.split()) for prompt in part) for part in parts]
        assert max(lengths) - min(lengths) < 1, name


@given(
    part=st.sampled_from(sorted(PARTS)),
    slices=st.none() | st.lists(st.sampled_from(SLICES), min_size=1, unique=True),
    data=st.data(),
)
def test_prompts_are_spread_evenly(part, slices, data) -> None:
    """As many as asked for, one more in the first slices than in the last ones; a smaller set lies in a larger one."""
    names = slices or SLICES
    of_part = {name: every_prompt()[name][PARTS[part]] for name in names}
    sizes = st.integers(len(names), sum(map(len, of_part.values())))
    smaller, larger = sorted([data.draw(sizes), data.draw(sizes)])
    few, many = (standard_prompts(size, slices, part) for size in (smaller, larger))
    counts = [len(prompts) for prompts in few.values()]
    assert list(few) == names
    assert sum(counts) == smaller
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1
    for name in names:
        assert many[name][: len(few[name])] == few[name] == of_part[name][: len(few[name])]


@pytest.mark.parametrize(
    ("part", "slices", "size"),
    [
        ("control", None, 40),
        ("pool", None, 96),
        ("held_out", None, 40),
        ("control", ["math"], 5),
        ("pool", ["math"], 12),
    ],
)
def test_the_size_unless_it_is_given(part, slices, size) -> None:
    """Five prompts of each slice, twelve in a pool."""
    chosen = standard_prompts(slices=slices, part=part)
    assert sum(map(len, chosen.values())) == size
    assert len({len(prompts) for prompts in chosen.values()}) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"part": "test"}, ValueError, r"part='test' is unknown; known parts: \['control', 'pool', 'held_out'\]"),
        ({"part": ["pool"]}, ValueError, r"part=\['pool'\] is unknown"),
        ({"slices": ["math", "maths"]}, ValueError, r"slices has the unknown \['maths'\]; known slices: \['story', "),
        ({"slices": "math"}, TypeError, "slices='math' is no list; give some of"),
        (
            {"slices": ["math", "math"]},
            ValueError,
            r"slices=\['math', 'math'\] must name one slice or more, none of th",
        ),
        ({"slices": []}, ValueError, r"slices=\[\] must name one slice or more"),
        ({"size": 7}, ValueError, "size=7 must be at least 8, a prompt for each slice, and at most 128"),
        ({"size": 81, "part": "held_out"}, ValueError, "at most 80: that many there are in part 'held_out' of 8 sli"),
        ({"size": 17, "slices": ["math"]}, ValueError, "size=17 must be at least 1, .* and at most 16"),
        ({"size": 8.0}, TypeError, "size=8.0 is no whole number"),
        ({"size": True}, TypeError, "size=True is no whole number"),
        ({"tokenizer": "gpt2"}, TypeError, "tokenizer='gpt2' is not callable"),
        (
            {"model": torch.nn.Linear(1, 1)},
            TypeError,
            r"responses are drawn from a model with generate\(\), not Linear",
        ),
        ({"tokenizer": byte_tokenizer(IN_PARTS)}, ValueError, "leaves out the content of a message"),
        (
            {"model": tiny_llama()},
            ValueError,
            "prompt 0 of the control set has token id .* outside the vocabulary of 61",
        ),
        ({"temperature": 0.0}, ValueError, "temperature=0.0 must be positive"),
        ({"progress": 3}, TypeError, "progress=3 is none of"),
    ],
)
def test_what_cannot_be_had_is_refused(options, error, message) -> None:
    """Unknown names, sizes out of range and what cannot draw, with what there is."""
    with pytest.raises(error, match=message):
        ControlSet.standard(**{"model": model(), "tokenizer": CHATML, "max_new_tokens": 1, **options})


@pytest.mark.parametrize("reader", [CHATML, byte_tokenizer()])
def test_responses_are_the_model_s_own(reader) -> None:
    """What `resample` draws for the chosen prompts, which are one message each if the tokenizer knows messages."""
    policy = model().train()
    before = RNGState.capture()
    control = ControlSet.standard(policy, reader, 10, ["math", "story", "code"], max_new_tokens=3, seed=5)
    assert same_bits(RNGState.capture().torch_cpu, before.torch_cpu)
    assert policy.training
    assert {name: len(members) for name, members in control.slices.items()} == {"math": 4, "story": 3, "code": 3}
    texts = [text for prompts in standard_prompts(10, ["math", "story", "code"]).values() for text in prompts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = ControlSet.from_texts(reader, chats if reader.chat_template else texts, texts, control.slices)
    assert control == prompts.resample(policy, max_new_tokens=3, seed=5)
    assert control != ControlSet.standard(policy, reader, 10, ["math", "story", "code"], max_new_tokens=3, seed=6)


def test_options_of_the_draw() -> None:
    """Further arguments reach the draw, and so does a function that is told how far it is."""
    told: list[tuple[int, int]] = []
    greedy = {"size": 2, "slices": ["fact", "math"], "max_new_tokens": 4, "temperature": 1e-4}
    control = ControlSet.standard(model(), CHATML, **greedy, progress=lambda *counts: told.append(counts))
    assert told == [(1, 2), (2, 2)]
    assert control == ControlSet.standard(model(), CHATML, **greedy, do_sample=True, seed=9)


def test_a_response_may_be_its_end_alone() -> None:
    """A model that stops at once has responses of one token, which are measured."""
    policy = model()
    end = CHATML.convert_tokens_to_ids("<|im_end|>")
    control = ControlSet.standard(policy, CHATML, 1, ["fact"], sequence_bias=[[[end], 1e4]], eos_token_id=end)
    assert control.responses[0].tolist() == [end]
    assert control.decode(CHATML)[0][1] == "<|im_end|>"


def test_the_parts_of_a_tokenizer_share_no_prompt() -> None:
    """So a pool of one part and a control set of another go together."""
    sets = [ControlSet.standard(model(), CHATML, 8, part=part, max_new_tokens=1) for part in PARTS]
    prompts = [{tuple(prompt.tolist()) for prompt in control.prompts} for control in sets]
    assert len(set.union(*prompts)) == 24
    assert len(sets[0] + sets[1] + sets[2]) == 24


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pretrained_model_answers() -> None:
    """SmolLM2 reads each prompt as a user's message and answers in words; the end of its turn is the last token."""
    sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
    from smollm import DEFAULT_MODEL, find, load

    policy, tokenizer = load(find(DEFAULT_MODEL))
    control = ControlSet.standard(policy, tokenizer, 4, ["fact", "refusals"], max_new_tokens=64, progress=False)
    texts = [text for prompts in standard_prompts(4, ["fact", "refusals"]).values() for text in prompts]
    for text, (prompt, response) in zip(texts, control.decode(tokenizer), strict=True):
        assert prompt.endswith(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        assert len(response.split()) > 3
        assert "<|im_end|>" not in response.removesuffix("<|im_end|>")
