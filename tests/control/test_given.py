"""Control sets of batches: how they are built, cut, kept, and what is refused."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step_optim import ControlSet, TokenKL
from tests.batches import KINDS, SLICES, masked, others, seen, short, spoken, tagged, told, translated
from tests.models import ragged_control, tiny_llama

EVERY = pytest.mark.parametrize("name", KINDS)


@EVERY
def test_every_row_is_an_example(name) -> None:
    """Numbered in the order of the batches; its responses are the labels of its measured positions."""
    batches = KINDS[name].batches()
    control = ControlSet.from_batches(batches, SLICES)
    wanted = [[label for label in row if label != -100] for batch in batches for row in batch["labels"].tolist()]
    assert [response.tolist() for response in control.responses] == wanted
    assert (len(control), control.response_tokens) == (3, sum(map(len, wanted)))
    assert control.prompt_of_row.tolist() == [i for i, row in enumerate(wanted) for _ in row]
    assert control.slices == {"first": (0, 2), "second": (1,)}
    assert repr(control) == (
        f"ControlBatches(2 batches, 3 examples, {control.response_tokens} measured positions, "
        "slices={'first': 2, 'second': 1}, device='cpu')"
    )


def test_batches_are_given_as_they_come() -> None:
    """By labels or masks of slices, from any iterable, with a processor's own mappings; None counts as nothing."""
    plain = ControlSet.from_batches(translated(), {"a": [0, 1], "b": [2]})
    encodings = [transformers.BatchEncoding(batch) for batch in translated()]
    assert ControlSet.from_batches(iter(encodings), ["a", "a", "b"]) == plain
    with_none = [{**batch, "pixel_values": None} for batch in translated()]
    assert ControlSet.from_batches(with_none, {"a": torch.tensor([True, True, False]), "b": [2]}) == plain


def test_batches_are_copied() -> None:
    """A collator may write into its tensors again."""
    batches = translated()
    control = ControlSet.from_batches(batches)
    for batch in batches:
        for tensor in batch.values():
            tensor.zero_()
    assert control == ControlSet.from_batches(translated())


@EVERY
def test_a_control_set_is_known_by_all_of_its_tensors(name) -> None:
    """One bit anywhere makes another one; so do other examples, slices, and another shift."""
    batches = KINDS[name].batches()
    control = ControlSet.from_batches(batches)
    assert control == ControlSet.from_batches(KINDS[name].batches())
    assert len({control, ControlSet.from_batches(KINDS[name].batches())}) == 1
    assert control.to("cpu") == control
    for number, batch in enumerate(batches):
        for key, tensor in batch.items():
            changed = tensor.clone()
            changed[-1, -1] = 1 if key == "labels" else changed[-1, -1] + 1
            changed_batches = [{**b, key: changed} if i == number else b for i, b in enumerate(batches)]
            if not torch.equal(changed, tensor):
                assert ControlSet.from_batches(changed_batches).digest != control.digest
    for other in (control.select([0, 1]), control.select([1, 0, 2]), ragged_control()):
        assert control != other
        assert control.digest != other.digest
    assert control != ControlSet.from_batches(batches, SLICES)
    assert control != ControlSet.from_batches(batches, shift=KINDS[name].shift)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, unique=True))
def test_select_keeps_batches_whole(kept) -> None:
    """In any order; batches of which nothing is kept are left out, and slices that lose all of theirs."""
    control = ControlSet.from_batches(translated(), SLICES)
    part = control.select(kept)
    assert [r.tolist() for r in part.responses] == [control.responses[i].tolist() for i in kept]
    assert [p.tolist() for p in part.prompts] == [control.prompts[i].tolist() for i in kept]
    assert part.slices == {
        name: tuple(kept.index(i) for i in members if i in kept)
        for name, members in control.slices.items()
        if set(members) & set(kept)
    }
    assert len(part.batches) == len({control.places[i][0] for i in kept})
    for i, (number, row) in zip(kept, part.places, strict=True):
        old = control.batches[control.places[i][0]]
        assert part.batches[number] is old
        assert row == control.places[i][1]
    assert part.select(range(len(kept))) == part


def test_split() -> None:
    """By a fraction, by examples and by slices, as any control set."""
    control = ControlSet.from_batches([*translated(), *masked()], ["a", "a", "a", "b", "b", "b"])
    kept, out = control.split(0.34)
    assert (len(kept), len(out)) == (4, 2)
    assert set(out.slices) == {"a", "b"}
    assert [len(part) for part in control.split([0])] == [5, 1]
    assert control.split("b")[1] == control.select([3, 4, 5])


@EVERY
def test_saved_and_loaded(name, tmp_path) -> None:
    """Bit for bit, whatever the dtypes; nothing is unpickled."""
    batches = KINDS[name].batches()
    batches[1]["extra"] = torch.tensor([[True]])
    batches[1]["narrow"] = torch.tensor([[1.5]], dtype=torch.bfloat16)
    for control in (
        ControlSet.from_batches(batches, SLICES, shift=KINDS[name].shift),
        ControlSet.from_batches(batches).select([2, 0]),
    ):
        control.save(tmp_path / "control")
        loaded = ControlSet.load(tmp_path / "control")
        assert loaded == control
        assert loaded.digest == control.digest
        assert (loaded.places, loaded.shift) == (control.places, control.shift)


def test_a_file_that_holds_something_else_is_refused(tmp_path) -> None:
    """Other tensors, half a file, a pickle."""
    import safetensors.torch

    path = tmp_path / "control"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"control holds no valid control set \(KeyError"):
        ControlSet.load(path)
    ControlSet.from_batches(translated()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="control holds no valid control set"):
        ControlSet.load(path)
    path.write_bytes(content.replace(b"[1, 0]", b"[1, 7]"))
    with pytest.raises(ValueError, match="rows that its batches do not have"):
        ControlSet.load(path)
    torch.save({}, path)
    with pytest.raises(ValueError, match="control holds no valid control set"):
        ControlSet.load(path)


def test_without_safetensors_there_is_no_file(tmp_path, monkeypatch) -> None:
    """It says what is missing."""
    control = ControlSet.from_batches(translated())
    control.save(tmp_path / "control")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        control.save(tmp_path / "other")
    with pytest.raises(ImportError, match="pip install safetensors"):
        ControlSet.load(tmp_path / "control")


def test_two_sets_of_batches_are_added() -> None:
    """Slices of one name are joined; what is of another kind is not added."""
    one, two = ControlSet.from_batches(translated(), SLICES), ControlSet.from_batches(masked(), {"second": [0]})
    both = one + two
    assert both.slices == {"first": (0, 2), "second": (1, 3)}
    assert both.select([0, 1, 2]).select([0, 1, 2]).digest == one.digest
    assert both.select([3, 4, 5]).digest == two.digest
    for wrong in (lambda: one + ragged_control(), lambda: ragged_control() + one):
        with pytest.raises(TypeError, match="are of two kinds"):
            wrong()
    with pytest.raises(ValueError, match="prompt 0 of the second control set is prompt 2 of the first, with the same"):
        both + one.select([2])
    with pytest.raises(ValueError, match=r"differ in shift \(None, False\)"):
        one + ControlSet.from_batches(masked(), shift=False)


def test_nothing_is_made_on_a_default_device(tmp_path) -> None:
    """Tensors live where they were given."""
    batches, model = told(), tiny_llama()
    given_there = ControlSet.from_batches(batches, SLICES)
    plain = TokenKL(model, given_there)
    with torch.device("meta"):
        control = ControlSet.from_batches(batches, SLICES)
        assert control.device.type == "cpu"
        assert control.digest == given_there.digest
        kept, held_out = control.split(0.5)
        assert len(kept) + len(held_out) == len(control)
        control.save(tmp_path / "control")
        assert ControlSet.load(tmp_path / "control") == control
        kl = TokenKL(model, control, pool=ControlSet.from_batches(others(batches)))
        kl.anchor()
        assert kl().mean == 0.0
    assert (kl.readout, kl.noise_floor) == (plain.readout, plain.noise_floor)


def test_fresh_responses_are_refused() -> None:
    """Which part is the prompt, a batch does not say."""
    with pytest.raises(TypeError, match="cannot draw fresh responses: make new batches"):
        ControlSet.from_batches(told()).resample(tiny_llama())
    with pytest.raises(TypeError, match="which is perhaps no text; decode the input_ids"):
        ControlSet.from_batches(told()).decode(None)


def changed(key: str, value: object, batches=translated) -> list[dict[str, Tensor]]:
    first, *rest = batches()
    return [*rest, {**first, key: value}]


REFUSED = {
    "one batch": (translated()[0], TypeError, r"is one batch; give a list of them"),
    "a tensor": (torch.ones(2, 2), TypeError, r"batches=tensor.* is no list"),
    "a number": (3, TypeError, r"batches=3 is no list"),
    "nothing": ([], ValueError, "the control set is empty"),
    "a batch that is no mapping": ([*told(), [1, 2]], TypeError, r"batch 2 is \[1, 2\]; give mappings of tensors"),
    "no labels": (
        [{"input_ids": torch.ones(1, 2, dtype=torch.long)}],
        ValueError,
        r"batch 0 has no labels, only \['input_ids'\]",
    ),
    "nothing but labels": (
        [{"labels": torch.ones(1, 2, dtype=torch.long)}],
        ValueError,
        "batch 0 has nothing but labels",
    ),
    "a row without a measured position": (
        changed("labels", torch.tensor([[1, 2], [-100, -100]])),
        ValueError,
        "batch 1, row 1: no position is measured",
    ),
    "a negative label": (
        changed("labels", torch.tensor([[1, 2], [3, -1]])),
        ValueError,
        "batch 1, row 1: the label -1 is neither -100 nor 0 or more",
    ),
    "one label a text": (
        changed("labels", torch.tensor([1, 2])),
        ValueError,
        r"batch 1: labels have the shape \(2,\).*use PolicyKL",
    ),
    "labels that are numbers": (changed("labels", torch.ones(2, 2)), ValueError, "labels are of torch.float32"),
    "labels that are flags": (
        changed("labels", torch.ones(2, 2, dtype=torch.bool)),
        ValueError,
        "labels are of torch.bool",
    ),
    "no tensor": (changed("lengths", [1, 2]), TypeError, r"batch 1: lengths is \[1, 2\], no tensor; leave it out"),
    "a name that is none": (changed(3, torch.ones(2)), TypeError, "batch 1 has the key 3"),  # type: ignore[arg-type]
    "other rows": (
        changed("attention_mask", torch.ones(3, 4)),
        ValueError,
        r"batch 1: attention_mask of shape \(3, 4\) does not have the 2 rows of the labels \(2, 5\)",
    ),
    "other decoder inputs": (
        changed("decoder_input_ids", torch.ones(2, 3, dtype=torch.long)),
        ValueError,
        r"batch 1: labels have the shape \(2, 5\), decoder_input_ids \(2, 3\)",
    ),
    "no values": (
        changed("attention_mask", torch.ones(2, 4, device="meta")),
        ValueError,
        "batch 1: attention_mask is a tensor on the meta device",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_nothing_can_be_measured_on_is_refused(what) -> None:
    """The message names the batch, the row where there is one, and the remedy."""
    batches, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        ControlSet.from_batches(batches)


def test_a_shift_that_does_not_fit_is_refused() -> None:
    """As soon as it is known: a label at position 0, labels of another shape than the ids."""
    with pytest.raises(ValueError, match="batch 0, row 1: position 0 has a label"):
        ControlSet.from_batches(short([[-100, 1, 2, 3], [4, 1, 2, 3]]), shift=True)
    with pytest.raises(ValueError, match=r"batch 0: labels have the shape \(2, 5\), input_ids \(2, 4\)"):
        ControlSet.from_batches(translated(), shift=True)
    with pytest.raises(TypeError, match="shift=1 must be True"):
        ControlSet.from_batches(told(), shift=1)  # type: ignore[arg-type]


def test_slices_name_rows() -> None:
    """An index that no row has is refused, as for any control set."""
    with pytest.raises(ValueError, match="slice 'a' holds 3, but prompts are numbered 0 to 2"):
        ControlSet.from_batches(spoken(), {"a": [3]})


def test_what_has_another_name_tells_examples_apart_too() -> None:
    """Whole, for nobody knows which part of it is whose."""
    labels = torch.tensor([[1, 2]])
    batches = [{"codes": torch.tensor([[3, 4]]) + i, "labels": labels} for i in range(2)]
    keys = ControlSet.from_batches(batches).keys(shift=False)
    assert keys[0] != keys[1]
    assert ControlSet.from_batches(batches[1:]).keys(shift=False) == keys[1:]


def test_keys_tell_examples_apart() -> None:
    """By the text without its padding, the sound, the pictures; not by labels, nor by what a decoder is given."""
    control = ControlSet.from_batches([*translated(), *spoken(), *seen(), *tagged()])
    keys = control.keys(shift=False)
    assert len(set(keys)) == len(control)
    again = [*translated(), *spoken(), *seen(), *tagged()]
    for batch in again:
        batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] + 1)
        batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
        if "attention_mask" in batch:
            padding = torch.zeros(len(batch["labels"]), math.comb(4, 2), dtype=torch.long)
            batch["attention_mask"] = torch.cat([batch["attention_mask"], padding], 1)
            batch["input_ids"] = torch.cat([batch["input_ids"], padding + 9], 1)
    assert ControlSet.from_batches(again).keys(shift=False) == keys
