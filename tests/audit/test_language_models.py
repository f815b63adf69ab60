"""What `TokenKL` takes for a causal language model, and what it says of anything else."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from step_optim import ControlSet, STEPOptimizer, TokenKL
from tests import reference
from tests.models import VOCAB, Bigram, _common, nudge, ragged_control, tiny_gpt2, tiny_llama

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Wrapped(nn.Module):
    """Seems to take every argument, and passes them to a model that takes ids alone."""

    def __init__(self, result: Any = lambda logits: logits) -> None:
        super().__init__()
        self.inner, self.result = Bigram(), result

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.result(self.inner(*args, **kwargs))


RESULTS = {
    "a tensor": lambda z: z,
    "logits and loss": lambda z: (z, z.mean()),
    "loss and logits": lambda z: (z.mean(), z),
    "logits, None and values": lambda z: (z, None, z[..., :1]),
    "a mapping": lambda z: {"loss": z.mean(), "logits": z},
    "a list": lambda z: [z],
}


@pytest.mark.parametrize("result", RESULTS)
def test_logits_are_found_in_what_a_model_returns(result) -> None:
    """Whatever they come with, the movement is that of the logits."""
    model, control = Wrapped(RESULTS[result]), ragged_control()
    old = reference.policy_of(model.inner, control)
    kl = TokenKL(model, control)
    kl.anchor()
    nudge(model, 0.1)
    new = reference.policy_of(model.inner, control)
    wanted = reference.movement(new, old, control.slices)
    found = kl()
    assert found.mean == pytest.approx(wanted.mean, rel=1e-4)
    assert found.slices == pytest.approx(wanted.slices, rel=1e-4)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_arguments_that_the_model_inside_does_not_take_are_left_out(wrap) -> None:
    """PEFT without a task type, DataParallel and compiled models promise to take anything."""
    lora = peft.get_peft_model(Bigram(), peft.LoraConfig(target_modules=["head"], r=2, init_lora_weights=False))
    for model in (Wrapped(), lora):
        optimizer = STEPOptimizer(
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
            kl=TokenKL(wrap(model), ragged_control(), check_parameters=False),
            budget=math.inf,
        )
        model(torch.tensor([[1, 2, 3]])).square().mean().backward()
        optimizer.step()
        assert optimizer.last.candidate.mean > 0


class LastOnly(Bigram):
    """Returns the logits of the last position alone, as a forward without targets may."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids)[:, -1:]


class Reward(Bigram):
    """One score a token."""

    def __init__(self) -> None:
        super().__init__(vocab=VOCAB)
        self.head = nn.Linear(8, 1)


class Tagger(Bigram):
    """A class for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)


class Looks(Bigram):
    """Every token sees all others."""

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        return self.head(hidden + hidden.mean(1, keepdim=True))


class Gate(Bigram):
    """Every token sees all others, as soon as a gate opens that is shut at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        return self.head(hidden + self.gate * hidden.mean(1, keepdim=True))


class Probabilities(Bigram):
    """Returns what a softmax makes of its logits."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).softmax(-1)


class NoMask(Bigram):
    """Does not bear a mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        assert attention_mask is None, "no masks here"
        return super().forward(input_ids)


class OtherName(Bigram):
    """Its argument is no tensor of ids."""

    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch["tokens"])


def bert(kind: Any, **options: Any) -> nn.Module:
    return kind(transformers.BertConfig(vocab_size=VOCAB, max_position_embeddings=64, **SMALL, **options))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def llama_of(kind: Any, **options: Any) -> nn.Module:
    return kind(transformers.LlamaConfig(**{**_common(VOCAB, 16, 1), "pad_token_id": 0}, **options))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (LastOnly, r"logits of 1 of \d+ positions; TokenKL needs those of every token"),
        (Reward, r"one logit a token, as reward models do"),
        (Tagger, r"prompt 0 of the control set has token id 21, outside the vocabulary of 5"),
        (
            lambda: llama_of(transformers.LlamaForTokenClassification, num_labels=3),
            r"the response of prompt 0 has token id 21, and the model has 3 logits a token",
        ),
        (Looks, r"Looks is no causal language model: its logits at a token depend on later tokens"),
        (Gate, r"Gate is no causal language model: its logits at a token depend on later tokens"),
        (Probabilities, r"the model returned probabilities, which add up to 1 in every row"),
        (NoMask, r"TokenKL cannot read NoMask \(AssertionError: no masks here"),
        (OtherName, r"TokenKL cannot read OtherName: its forward raises IndexError"),
        (lambda: bert(transformers.BertForMaskedLM), r"BertForMaskedLM is no causal language model"),
        (lambda: bert(transformers.BertModel), r"without logits; TokenKL needs a causal language model"),
        (t5, r"T5ForConditionalGeneration is an encoder-decoder"),
        (lambda: llama_of(transformers.LlamaModel), r"without logits.*AutoModelForCausalLM"),
        (
            lambda: llama_of(transformers.LlamaForSequenceClassification, num_labels=3),
            r"logits of shape \(\d+, 3\).*For a classifier use PolicyKL",
        ),
        (lambda: llama_of(transformers.LlamaForTokenClassification, num_labels=1), r"one logit a token"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(build, message) -> None:
    """With the cause, and what to pass instead, before any weight moves."""
    with pytest.raises(ValueError, match=message):
        TokenKL(build().eval(), ragged_control())


@pytest.mark.parametrize("model", ["gpt2", lambda ids: ids])
def test_what_is_no_module_is_refused(model) -> None:
    """A name is not loaded, and a function has weights that nobody can find."""
    with pytest.raises(TypeError, match=r"is no torch.nn.Module; load the model first"):
        TokenKL(model, ragged_control())


def test_a_text_that_is_too_long_is_no_bad_token_id() -> None:
    """A table of positions ends with the same IndexError as an embedding: each is told as what it is."""
    model = tiny_gpt2()
    long = ControlSet.from_ids([[3] * 60, [4]], [[5] * 10, [6]])
    with pytest.raises(ValueError, match=r"prompt 0 .* has 70 tokens with its response, more than .*=64 in its config"):
        TokenKL(model, long)
    with pytest.raises(ValueError, match="prompt 0 of the control set has a token id outside the vocabulary"):
        TokenKL(Bigram(vocab=5), ControlSet.from_ids([[3, 9]], [[4]]))


class LowRank(nn.Module):
    """A head of two factors, without a weight of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(4, VOCAB))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ self.b


@pytest.mark.parametrize(
    "head", [LowRank, lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, VOCAB)), lambda: nn.Linear(16, VOCAB)]
)
def test_heads_of_any_kind_are_run_on_response_rows(head) -> None:
    """A head that is no plain linear layer is the model's own, with a word in the fallbacks."""
    model, control = tiny_llama(), ragged_control()
    model.lm_head = head()
    old = reference.policy_of(model, control)
    kl = TokenKL(model, control)
    kl.anchor()
    nudge(model, 0.1)
    assert kl().mean == pytest.approx(reference.movement(reference.policy_of(model, control), old, {}).mean, rel=1e-3)
    assert kl.readout == ("hidden" if type(model.lm_head) is nn.Linear else "rows")
    assert bool(kl.fallbacks) == (kl.readout == "rows")


class Longest(Bigram):
    """A prompt reads otherwise beside a longer one."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * (1 + 0.05 * input_ids.shape[1])


def test_a_prompt_reads_the_same_alone_and_beside_others() -> None:
    """Where the model has other logits for a batch, each prompt is read alone."""
    model, control = Longest(), ragged_control()
    alone = [control.select([i]) for i in range(len(control))]
    old = [reference.policy_of(model, one) for one in alone]
    kl = TokenKL(model, control, micro_batch=4)
    kl.anchor()
    nudge(model, 0.1)
    each = [reference.movement(reference.policy_of(model, one), o, {}).mean for one, o in zip(alone, old, strict=True)]
    assert kl().mean == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert any("each is read alone" in why for why in kl.fallbacks)


def test_what_only_shows_when_weights_have_moved_is_seen_at_construction() -> None:
    """A gate that is 0 at first hides an adapter that the cut-off prefix would lose."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.gate = tiny_llama(), nn.Parameter(torch.zeros(()))
            self.config = self.model.config

        def get_output_embeddings(self) -> nn.Module:
            return self.model.lm_head

        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            out = self.model(input_ids, **options)
            out.logits = out.logits * (1 + self.gate * (input_ids == 7).any(1)[:, None, None])
            return out

    model = Gated()
    control = ControlSet.from_ids([[7, 8, 9, 10, 3, 4], [7, 8, 9, 10, 5]], [[20, 21], [22, 23, 24]])
    kl = TokenKL(model, control, prefix=True)
    assert kl.prefix_tokens == 0
    assert any("shared tokens run in every prompt" in why for why in kl.fallbacks)
    assert kl.readout == "full"


def test_ways_are_compared_again_when_the_model_has_changed() -> None:
    """An adapter on the head that is added later makes its hidden states another model's."""
    model, control = tiny_llama(), ragged_control()
    kl = TokenKL(model, control, check_parameters=False)
    assert kl.readout == "hidden"
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False), model
    )
    kl.anchor()
    assert kl.readout == "rows"
    old = reference.policy_of(model, control)
    nudge(model, 0.1)
    assert kl().mean == pytest.approx(reference.movement(reference.policy_of(model, control), old, {}).mean, rel=1e-3)
