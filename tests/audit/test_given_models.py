"""What `TokenKL` finds out of a model that reads batches, and what it refuses."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from step_optim import ControlSet, TokenKL
from tests import reference
from tests.batches import (
    KINDS,
    bart,
    bert,
    masked,
    others,
    policy_of,
    short,
    spoken,
    t5,
    tagged,
    tagger,
    translated,
    whisper,
)
from tests.models import VOCAB, Bigram, nudge, ragged_control, tiny_llama


def test_decoder_inputs_of_ones_own_are_taken_as_they_are() -> None:
    """They are not made of the labels again."""
    own = translated()
    for batch in own:
        batch["decoder_input_ids"] = batch["labels"].clamp_min(0) * 0 + torch.arange(batch["labels"].shape[1]) + 7
    model = bart()
    kl = TokenKL(model, ControlSet.from_batches(own))
    made = TokenKL(model, ControlSet.from_batches(translated()))
    previous = policy_of(model, own, shift=False)
    kl.anchor()
    made.anchor()
    nudge(model, 0.2)
    wanted = reference.movement(policy_of(model, own, shift=False), previous, {})
    assert kl().mean == reference.near(wanted.mean, 1e-4)
    assert abs(kl().mean - made().mean) > 1e-3 * kl().mean


@pytest.mark.parametrize("build", [t5, bart, whisper])
def test_decoder_inputs_are_the_models_own(build) -> None:
    """What is made of the labels is what the model makes of them."""
    model, batches = build().eval(), spoken() if build is whisper else translated()
    kl = TokenKL(model, ControlSet.from_batches(batches), noise_floor=False)
    for read, batch in zip(kl.control.batches, batches, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(model(**read.arguments).logits, model(**batch).logits, rtol=0, atol=0)


def lora(model: nn.Module, task: str | None, targets: list[str]) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type=task))


ADAPTED = {
    "t5": (lambda task: lora(t5(), task, ["q", "v"]), "SEQ_2_SEQ_LM", "t5"),
    "bert": (lambda task: lora(bert(), task, ["query", "value"]), None, "bert"),
    "tagger": (lambda task: lora(tagger(), task, ["query"]), "TOKEN_CLS", "tagger"),
    "llama": (lambda task: lora(tiny_llama(), task, ["q_proj"]), "CAUSAL_LM", "llama"),
}


@pytest.mark.parametrize("task", [True, False])
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name, task) -> None:
    """PEFT, with a task type or without: the kind of the model is that of the one inside."""
    build, task_type, inside = ADAPTED[name]
    kind, model = KINDS[inside], build(task_type if task else None)
    kl = TokenKL(model, ControlSet.from_batches(kind.batches()))
    kl.anchor()
    assert kl.control.shift == kind.shift
    previous = policy_of(model, kind.batches(), shift=kind.shift)
    nudge(model, 0.5)
    wanted = reference.movement(policy_of(model, kind.batches(), shift=kind.shift), previous, {})
    assert kl().mean == reference.near(wanted.mean, 1e-4)


def test_sound_is_cast_with_the_weights() -> None:
    """A bfloat16 model is audited in float32, features and all."""
    model = whisper().to(torch.bfloat16)
    batches = [{n: t.bfloat16() if t.is_floating_point() else t for n, t in b.items()} for b in spoken()]
    kl = TokenKL(model, ControlSet.from_batches(batches), audit_dtype=torch.float32)
    kl.anchor()
    previous = policy_of(model, batches, shift=False)
    nudge(model, 0.5)
    wanted = reference.movement(policy_of(model, batches, shift=False), previous, {})
    assert kl().mean == reference.near(wanted.mean, 1e-3)


class Nameless(nn.Module):
    """A model that says nothing of itself."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.inside(**inputs).logits


def test_shift_is_the_users_where_the_model_does_not_tell() -> None:
    """Refused without; as given with it; and another than the class name says, if that is wanted."""
    model = Nameless(bert())
    with pytest.raises(ValueError, match=r"Nameless does not say which logits belong to a label.*shift=False"):
        TokenKL(model, ControlSet.from_batches(masked()))
    assert TokenKL(model, ControlSet.from_batches(masked(), shift=False)).control.shift is False
    one_early = TokenKL(bert(), ControlSet.from_batches(tagged_early(), shift=False))
    assert one_early.control.shift is False


def test_ids_are_not_compared_with_classes() -> None:
    """A tagger that does not tell its vocabulary has fewer classes than there are tokens."""
    pool = ControlSet.from_batches(others(tagged()), shift=False)
    kl = TokenKL(Nameless(tagger()), ControlSet.from_batches(tagged(), shift=False), pool=pool)
    assert kl.readout == "full"


class Placeholders(Bigram):
    """Looks at a picture where there is an id that is no token."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids.clamp_min(0))
        if pixel_values is not None:
            hidden = torch.where(input_ids[..., None] < 0, pixel_values, hidden)
        return self.head(hidden)


def test_placeholders_of_pictures_may_be_any_ids() -> None:
    """They are outside the vocabulary in some models; without a picture, ids are tokens."""
    (batch,) = short([[-100, 1, 2, 3]])
    batch["input_ids"][0, 0] = -200
    with pytest.raises(ValueError, match="batch 0, row 0: input_ids has token id -200, outside the vocabulary of 61"):
        TokenKL(Placeholders(), ControlSet.from_batches([batch], shift=True))
    batch["pixel_values"] = torch.ones(8)
    kl = TokenKL(Placeholders(), ControlSet.from_batches([batch], shift=True))
    assert kl.noise_floor is not None


def tagged_early() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[7, -100]])}]


class Wide(Bigram):
    """Returns more positions than it was given."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(torch.cat([input_ids, input_ids], 1))


class Alone(nn.Module):
    """Returns one row a text, as a classifier of texts does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(VOCAB, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(input_ids).mean(1)


class LooksForCausalLM(Bigram):
    """Is called causal, and looks at all tokens."""

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        return self.head(hidden + hidden.mean(1, keepdim=True))


REFUSED = {
    "more positions": (
        Wide,
        {"shift": True},
        short([[-100, 1, 2, 3]]),
        r"cannot read Wide on batch 0 .*logits of shape \(1, 8, 61\) for labels of shape \(1, 4\)",
    ),
    "no positions": (Alone, {"shift": False}, short([[0, 1, 2, 1]]), r"logits of shape \(1, 3\) for labels of shape"),
    "no head": (
        lambda: bert(transformers.BertModel),
        {"shift": False},
        masked(),
        "without logits; load it with its head",
    ),
    "one class": (lambda: tagger(labels=1), {}, short([[-100, 0, 0, 0]]), "one logit a position: with one class"),
    "a label of no class": (tagger, {}, short([[-100, 0, 5, 0]]), "batch 0, row 0: the label 5 is none of the 5"),
    "an argument too many": (
        Bigram,
        {"shift": True},
        short([[-100, 1, 2, 3]], length=torch.tensor([4])),
        r"cannot read Bigram on batch 0 \(TypeError: .*'length'.*the batch has \['input_ids', 'length'\]",
    ),
    "ids outside the vocabulary": (
        bert,
        {},
        [{"input_ids": torch.tensor([[5, 61]]), "labels": torch.tensor([[-100, 3]])}],
        "batch 0, row 0: input_ids has token id 61, outside the vocabulary of 61",
    ),
    "labels outside the decoder's vocabulary": (
        t5,
        {},
        [{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[70, 3]])}],
        "batch 0, row 0: decoder_input_ids has token id 70, outside the vocabulary of 61",
    ),
    "other shapes": (
        bert,
        {},
        [{"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[70, 3]])}],
        r"batch 0: labels have the shape \(1, 2\), input_ids \(1, 3\)",
    ),
    "a first label": (tiny_llama, {}, short([[-100, 1, 2, 3], [4, 1, 2, 3]]), "batch 0, row 1: position 0 has a label"),
    "no causal model": (LooksForCausalLM, {}, short([[-100, 1, 2, 3]]), "sees what it should predict"),
    "shifted twice": (t5, {"shift": True}, short([[-100, 1, 2, 3]]), "shift=True: the decoder inputs of T5"),
    "too long": (whisper, {}, [dict(spoken()[1], labels=torch.ones(1, 30, dtype=torch.long))], "on batch 0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused(what) -> None:
    """At construction, with the batch and the remedy."""
    build, options, batches, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        TokenKL(build(), ControlSet.from_batches(batches, **options))


def test_options_for_prompts_are_refused() -> None:
    """Batches stay as they are: neither cut anew nor without a prefix."""
    control = ControlSet.from_batches(translated())
    with pytest.raises(ValueError, match="micro_batch=2: batches are evaluated as they were given"):
        TokenKL(t5(), control, micro_batch=2)
    with pytest.raises(ValueError, match="prefix=True: batches are evaluated as they were given"):
        TokenKL(t5(), control, prefix=True)


def test_an_encoder_decoder_is_told_of_batches() -> None:
    """Prompts and responses are one sequence each; the message names what takes two."""
    for model in (t5(), bert()):
        with pytest.raises(ValueError, match=r"ControlSet\.from_batches"):
            TokenKL(model, ragged_control())
