"""Slices in every form that they are given in: indices, masks, labels, texts; and what is none of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import ControlSet
from step_optim.control.control_set import checked_slices
from tests.control.test_texts import tokenizer
from tests.models import ragged_control

NAMES = st.sampled_from(["math", "safety", "story", "Größe"])


@given(labels=st.lists(NAMES, min_size=1, max_size=8), made=st.sampled_from([list, tuple, np.array, iter]))
def test_labels_are_the_partition_that_they_name(labels, made) -> None:
    """One label for each prompt, in any list, means the same as the indices of each label."""
    indices = {name: [i for i, label in enumerate(labels) if label == name] for name in labels}
    assert checked_slices(made(labels), len(labels)) == checked_slices(indices, len(labels))


@given(members=st.sets(st.integers(0, 5), min_size=1), data=st.data())
def test_members_in_every_form(members, data) -> None:
    """Lists, sets, arrays, tensors, generators and masks of the same prompts are the same slice."""
    order = data.draw(st.permutations(sorted(members)))
    mask = [i in members for i in range(6)]
    forms = [order, tuple(order), set(order), np.array(order), torch.tensor(order), list(torch.tensor(order))]
    forms += [list(np.array(order)), (i for i in order), mask, np.array(mask), list(np.array(mask)), torch.tensor(mask)]
    for form in forms:
        assert set(checked_slices({"a": form}, 6)["a"]) == members


def test_labels_and_texts_when_a_control_set_is_made() -> None:
    """from_ids takes labels; from_texts also the prompts' own texts, which mean every prompt with that text."""
    assert ControlSet.from_ids([[1], [2], [3]], [[4]] * 3, np.array(["a", "b", "a"])).slices == {"a": (0, 2), "b": (1,)}
    prompts, slices = ["what", "is two", "what"], {"math": ["is two"], "both": ["what"], "mixed": [1, "what"]}
    control = ControlSet.from_texts(tokenizer("$A"), prompts, ["four"] * 3, slices)
    assert control.slices == {"math": (1,), "both": (0, 2), "mixed": (1, 0, 2)}
    control = ControlSet.from_texts(tokenizer("$A"), prompts, ["four"] * 3, ["math", "math", "safety"])
    assert control.slices == {"math": (0, 1), "safety": (2,)}


def test_no_slices() -> None:
    """None, and a mapping or list of nothing, mean no slices."""
    for none in (None, {}, []):
        assert checked_slices(none, 3) == {}


@pytest.mark.parametrize(
    ("slices", "error", "message"),
    [
        ({"a": 3}, TypeError, r"slice 'a' is 3; give a list of prompt indices, such as \[0, 1\]"),
        ({"a": True}, TypeError, "slice 'a' is True; give a list"),
        ({"a": torch.tensor(1)}, TypeError, r"slice 'a' is tensor\(1\); give a list"),
        ({"a": "what"}, TypeError, "slice 'a' is 'what'; give a list"),
        ({"a": None}, TypeError, "slice 'a' is None; give a list"),
        ({"a": {0: 1}}, TypeError, "slice 'a' is {0: 1}; give a list"),
        ({"a": [0.5]}, TypeError, "slice 'a' holds 0.5; give prompt indices, which are whole numbers"),
        ({"a": torch.tensor([0.0, 1.0])}, TypeError, "slice 'a' holds 0.0; give prompt indices"),
        ({"a": ["what"]}, TypeError, "slice 'a' names a prompt by its text, 'what'.*from_texts"),
        ({"a": [0, 3]}, ValueError, "slice 'a' holds 3, but prompts are numbered 0 to 2"),
        ({"a": [-1]}, ValueError, "slice 'a' holds -1"),
        ({"a": [0, 0]}, ValueError, "slice 'a' names a prompt twice"),
        ({"a": []}, ValueError, "slice 'a' is empty"),
        ({"a": [True]}, ValueError, "slice 'a' is a mask of 1 for 3 prompts"),
        ({"a": [0, True]}, ValueError, "slice 'a' is a mask"),
        ({"mean": [0]}, ValueError, "cannot be named 'mean'"),
        (["mean", "a", "a"], ValueError, "cannot be named 'mean'"),
        ({1: [0]}, TypeError, "slice names are texts, not 1"),
        (["a", "b"], ValueError, r"slices has 2 labels for 3 prompts; give {\"math\": \[0, 1\], ...}, or one label"),
        ([0, 0, 1], TypeError, "the label of prompt 0 is 0, and labels are texts; give .*, or one label for each"),
        (np.array([0, 0, 1]), TypeError, "the label of prompt 0 is 0, and labels are texts"),
        (["a", None, "b"], TypeError, "the label of prompt 1 is None"),
        ([[0, 1], [2]], TypeError, r"the label of prompt 0 is \[0, 1\]"),
        ("abc", TypeError, "slices='abc' is neither a mapping nor a list of labels; give"),
        (5, TypeError, "slices=5 is neither a mapping nor a list of labels"),
        ({"a", "b"}, TypeError, "is neither a mapping nor a list of labels"),
    ],
)
def test_what_is_no_slice_is_refused(slices, error, message) -> None:
    """Every other form is an error that shows it, and says what may be given."""
    with pytest.raises(error, match=message):
        checked_slices(slices, 3)


@pytest.mark.parametrize("members", [["nobody"], [[{"role": "user", "content": "what"}]], [{"role": "user"}]])
def test_a_text_that_is_no_prompt_is_refused(members) -> None:
    """The unknown text is shown."""
    with pytest.raises(ValueError, match=r"slice 'a' names .*, which is none of the prompts; repeat its whole text"):
        ControlSet.from_texts(tokenizer("$A"), ["what"], ["four"], {"a": members})


def test_selecting_by_mask_and_what_cannot_be_selected() -> None:
    """A boolean mask selects what it marks; doubled, unknown and fractional indices are refused."""
    control = ragged_control()
    assert control.select(np.array([True, False, False, True])) == control.select([0, 3])
    for wrong, message in (
        ([0, 0], "select names a prompt twice"),
        ([-1], "select holds -1"),
        ([0.5], "whole numbers"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            control.select(wrong)


def test_one_slice_name_and_a_mask_are_held_out() -> None:
    """A single name needs no list; a mask holds out what it marks; anything else is refused."""
    control = ragged_control()
    assert control.split("early") == control.split(["early"])
    assert control.split([True, False, False, True]) == control.split([0, 3])
    assert control.split(np.float32(0.5)) == control.split(0.5)
    for wrong in (None, [0.5], {"a": 1}, [None]):
        with pytest.raises(TypeError, match="held_out"):
            control.split(wrong)
