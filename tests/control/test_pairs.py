"""What a control set holds: two of them together, their texts, and what a person sees first."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import ControlSet, Movement
from tests.models import control_sets, ragged_control, tiny_llama
from tests.templates import STYLES


def pairs(control: ControlSet) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses as lists."""
    return [(p.tolist(), r.tolist()) for p, r in zip(control.prompts, control.responses, strict=True)]


@given(first=control_sets(), second=control_sets())
def test_a_sum_holds_the_prompts_of_both(first, second) -> None:
    """First those of the first; each slice is as large as in both together, and has the same prompts."""
    shared = [pair for pair in pairs(second) if pair in pairs(first)]
    if shared:
        with pytest.raises(ValueError, match=r"prompt \d of the second control set is prompt \d of the first, with th"):
            first + second
        return
    both = first + second
    assert pairs(both) == pairs(first) + pairs(second)
    assert list(both.slices) == list(dict.fromkeys([*first.slices, *second.slices]))
    for name, members in both.slices.items():
        expected = [pairs(part)[i] for part in (first, second) for i in part.slices.get(name, ())]
        assert [pairs(both)[i] for i in members] == expected
        assert len(set(members)) == len(members)


@given(control=control_sets(), data=st.data())
def test_a_sum_of_parts_is_the_whole(control, data) -> None:
    """Two parts that are selected from a set and added again hold what it held, if its prompts differ."""
    whole = ControlSet.from_ids([[i] for i in range(len(control))], control.responses, control.slices)
    count = data.draw(st.integers(1, max(1, len(whole) - 1)))
    if count == len(whole):
        return
    again = whole.select(range(count)) + whole.select(range(count, len(whole)))
    assert pairs(again) == pairs(whole)
    assert {name: set(members) for name, members in again.slices.items()} == {
        name: set(members) for name, members in whole.slices.items()
    }


def test_several_draws_for_a_prompt_may_be_added() -> None:
    """The same prompt with another response is another pair; all of a set twice is refused with the remedy."""
    control, model = ragged_control(), tiny_llama()
    twice = control + control.resample(model, max_new_tokens=8)
    assert len(twice) == 8
    assert dict(twice.slices) == {"early": (0, 1, 4, 5), "late": (1, 2, 3, 5, 6, 7)}
    with pytest.raises(ValueError, match=r"prompt 0 of the second .* prompt 0 of the first, .* with select\(\)"):
        twice + control


def test_what_cannot_be_added() -> None:
    """Sets on two devices, and what is no control set."""
    with pytest.raises(ValueError, match=r"one control set is on cpu, the other on meta; use to\(\.\.\.\)"):
        ragged_control() + ragged_control().to("meta")
    with pytest.raises(TypeError, match="unsupported operand"):
        ragged_control() + "control"


@pytest.mark.parametrize("name", STYLES)
def test_decode(name) -> None:
    """Texts as they are read: nothing is left out, cleaned up or added."""
    tokenizer, texts = STYLES[name].tokenizer(), ["a , b .", "é 雨\n\n", STYLES[name].response]
    control = ControlSet.from_texts(tokenizer, texts, texts)
    assert control.decode(tokenizer) == [(text, text) for text in texts]


def test_decode_needs_a_tokenizer_that_decodes() -> None:
    """A callable that only encodes is refused, and so is a name."""
    with pytest.raises(TypeError, match=r"function has no decode\(\); give a Hugging Face tokenizer"):
        ragged_control().decode(lambda text, add_special_tokens: {"input_ids": [1]})
    with pytest.raises(TypeError, match="tokenizer='gpt2' is not callable"):
        ragged_control().decode("gpt2")


def test_a_repr_is_short() -> None:
    """One line; with the eight standard slices two; and not a line for each of a hundred slices."""

    def shown(names: list[str]) -> list[str]:
        ids = [[i] for i in range(len(names))]
        return repr(ControlSet.from_ids(ids, ids, names)).split("\n")

    assert shown(["a", "b"]) == ["ControlSet(2 prompts, 2 response tokens, slices={'a': 1, 'b': 1}, device='cpu')"]
    assert str(ragged_control()) == repr(ragged_control())
    eight = shown(["story", "fact", "math", "code", "format", "advice", "translation", "refusals"])
    assert eight[0] == "ControlSet(8 prompts, 8 response tokens,"
    assert eight[1].startswith("    slices={'story': 1, 'fact': 1,")
    assert eight[1].endswith("'refusals': 1}, device='cpu')")
    many = shown([f"s{i}" for i in range(100)])
    assert len(many) == 2
    assert many[1].endswith("'s11': 1, and 88 more}, device='cpu')")
    assert len(many[1]) < 200


def test_parts_of_a_control_set_are_control_sets() -> None:
    """What its methods return can do what it can."""
    control = ragged_control()
    made = [control.to("cpu"), control.select([0]), *control.split(0.5), control.select([0]) + control.select([1])]
    assert {type(part) for part in made} == {ControlSet}
    assert torch.equal(made[-1].prompts[1], control.prompts[1])


def test_precision_is_that_of_a_movement_on_these_prompts() -> None:
    """A movement over others is refused, and one that has means only."""
    control = ControlSet.from_ids([[1], [2], [3]], [[4], [5], [6]], {"a": [0, 1]})
    moved = Movement.over([0.1, 0.2, 0.3], control.slices)
    assert control.precision(moved) == moved.precision
    assert control.precision(moved).slice_prompts == {"a": 2}
    with pytest.raises(ValueError, match="is over 3 prompts, and the control set has 2"):
        control.select([0, 1]).precision(moved)
    with pytest.raises(ValueError, match="this movement has means only"):
        control.precision(Movement(0.1))
