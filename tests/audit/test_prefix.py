"""The tight way to read a model: a shared prefix from its cache, checked against its own logits, or not used at all."""

from __future__ import annotations

import copy
import logging
import math
import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from step_optim import Budget, ControlSet, Project, STEPOptimizer, TokenKL
from step_optim.audit.batches import PROMPTS_AT_ONCE, Layout, micro_batch_of, shared_prefix, worth_sharing
from tests import reference
from tests.audit.test_token_kl import MODELS, build, close, expected
from tests.models import VOCAB, Bigram, control_sets, nudge, tiny_gemma2, tiny_gpt2, tiny_llama

EVERY = pytest.mark.parametrize("name", MODELS)
SHARES = [name for name in MODELS if name not in ("biased head", "bigram")]
SYSTEM = [7, 8, 9, 10, 11]


def chat(control: ControlSet, prefix: list[int] = SYSTEM) -> ControlSet:
    """The same control set behind a system prompt."""
    prompts = [torch.cat([torch.tensor(prefix, dtype=torch.long), prompt]) for prompt in control.prompts]
    return ControlSet.from_ids(prompts, control.responses, control.slices)


def chat_control() -> ControlSet:
    """Four prompts of unequal lengths behind one system prompt."""
    return ControlSet.from_ids(
        [[*SYSTEM, 3, 4, 5], [*SYSTEM, 6], [*SYSTEM, 14, 8], [*SYSTEM, 12, 10, 11, 12, 13]],
        [[20, 21], [22, 23, 24, 25, 26, 27, 28], [29], [30, 31, 32]],
        {"early": [0, 1], "late": [1, 2, 3]},
    )


class Inputs:
    """The shapes of the token ids that a model was called with."""

    def __init__(self, module: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        embedding = module.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda _, inputs: self.shapes.append(tuple(inputs[0].shape)))


@given(control=control_sets(), prefix=st.lists(st.integers(0, VOCAB - 1), max_size=4))
def test_the_shared_prefix_is_the_longest_that_leaves_every_prompt_a_token(control, prefix) -> None:
    """One token more is not shared by all, or would be the last of some prompt."""
    control = chat(control, prefix)
    length = shared_prefix(control)
    prompts = [prompt.tolist() for prompt in control.prompts]
    assert len(prefix) <= length < min(map(len, prompts))
    assert len({tuple(prompt[:length]) for prompt in prompts}) == 1
    longer = {tuple(prompt[: length + 1]) for prompt in prompts}
    assert len(longer) > 1 or length + 1 == min(map(len, prompts))


@given(control=control_sets(), micro_batch=st.integers(1, 5), data=st.data())
def test_the_layout_loses_nothing(control, micro_batch, data) -> None:
    """Every response row is predicted once, from its own text; masks count the prefix and no padding."""
    control = chat(control)
    layout = Layout.of(control, micro_batch, data.draw(st.integers(0, shared_prefix(control))))
    length = layout.prefix.shape[1]
    seen = {}
    for batch in layout.batches:
        assert int(batch.mask[:, :length].sum()) == length * len(batch.ids)
        width = batch.ids.shape[1]
        for position, row in zip(batch.positions.tolist(), batch.rows.tolist(), strict=True):
            place, column = divmod(position, width)
            text = layout.prefix[0].tolist() + batch.ids[place, : column + 1].tolist()
            assert int(batch.mask[place, : length + column + 1].sum()) == len(text)
            seen[row] = text
    wanted = [
        torch.cat([prompt, response])[: len(prompt) + tau].tolist()
        for prompt, response in zip(control.prompts, control.responses, strict=True)
        for tau in range(len(response))
    ]
    assert [seen[row] for row in range(len(wanted))] == wanted


def test_a_prefix_is_shared_where_it_spares_more_than_a_forward_costs() -> None:
    """The rule counts the tokens that are spared; the default micro-batch of a CPU is four prompts."""
    control = chat_control()
    assert worth_sharing(control, 6)
    assert not worth_sharing(control, 5)
    assert not worth_sharing(control.select([0]), 1000)
    assert micro_batch_of(control, None) == PROMPTS_AT_ONCE
    with pytest.raises(ValueError, match="micro_batch=0 must be at least 1 prompt"):
        TokenKL(tiny_llama(), control, micro_batch=0)
    assert TokenKL(tiny_llama(), control).prefix_tokens == 0
    assert TokenKL(tiny_llama(), control, prefix=True).prefix_tokens == len(SYSTEM)
    assert TokenKL(tiny_llama(), chat(control, [3] * 6)).prefix_tokens == 6 + len(SYSTEM)
    assert TokenKL(tiny_llama(), chat(control, [3] * 6), prefix=False).prefix_tokens == 0


@EVERY
@settings(max_examples=2)
@given(control=control_sets(), seed=st.integers(0, 99), size=st.sampled_from([0.01, 0.3]), batch=st.integers(1, 5))
def test_movement_behind_a_shared_prefix_equals_the_oracle(name, control, seed, size, batch) -> None:
    """Every architecture and readout equals the float64, uncached, one-by-one evaluation."""
    model, control = build(name, seed), chat(control)
    previous = reference.policy_of(model, control)
    kl = TokenKL(model, control, micro_batch=batch, prefix=True)
    assert (kl.prefix_tokens >= len(SYSTEM)) == (name in SHARES), kl.fallbacks
    kl.anchor()
    nudge(model, size, seed)
    close(kl(), expected(model, previous, control), rel=2e-3)


@EVERY
def test_zero_movement_behind_a_prefix_is_exactly_zero(name) -> None:
    """Weights that went and came back read 0.0."""
    model = build(name)
    kl = TokenKL(model, chat_control(), prefix=True)
    kl.anchor()
    before = copy.deepcopy(model.state_dict())
    nudge(model, 0.1)
    assert kl().mean > 0
    model.load_state_dict(before)
    assert kl().mean == 0.0


def test_the_prefix_runs_once_and_the_rest_without_it() -> None:
    """One forward over the prefix alone, then the micro-batches, cut."""
    model = tiny_llama()
    kl = TokenKL(model, chat_control(), micro_batch=2, prefix=True)
    inputs = Inputs(model)
    kl.anchor()
    assert inputs.shapes == [(1, 5), (2, 8), (2, 5)]


def test_attention_behind_a_sliding_window() -> None:
    """A window shorter than the prefix cuts the cache; what is read is what the model says."""
    config = tiny_gemma2().config
    config.sliding_window, config.num_hidden_layers = 4, 2
    config.layer_types = ["sliding_attention", "full_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    control = chat_control()
    previous = reference.policy_of(model, control)
    kl = TokenKL(model, control, prefix=True)
    assert kl.prefix_tokens == len(SYSTEM), kl.fallbacks
    kl.anchor()
    nudge(model, 0.3)
    close(kl(), expected(model, previous, control), rel=2e-3)


class Forgets(Bigram):
    """Takes a cache and returns one, but its logits depend on all tokens that it is given now."""

    def forward(self, input_ids: Tensor, past_key_values: object = None, use_cache: bool = False) -> object:
        """Logits of the sum of the embeddings so far."""
        hidden = self.embedding(input_ids).cumsum(1)
        return transformers.utils.ModelOutput(logits=self.head(hidden), past_key_values=transformers.DynamicCache())


class WritesIntoItsCache(Forgets):
    """Keeps a state that every forward adds to in place."""

    def forward(self, input_ids: Tensor, past_key_values: object = None, use_cache: bool = False) -> object:
        """Logits of the sum of the embeddings so far, the earlier tokens' from the cache."""
        hidden = self.embedding(input_ids).cumsum(1)
        if past_key_values is None:
            past = State(hidden[:, -1].clone())
        else:
            past = past_key_values
            past.sum += hidden[:, -1].mean(0)
            hidden = hidden + past.sum[:, None] - hidden[:, -1].mean(0)
        return transformers.utils.ModelOutput(logits=self.head(hidden), past_key_values=past)


class State:
    """A cache that is written in place, and shared by its copies."""

    def __init__(self, value: Tensor) -> None:
        self.sum = value

    def batch_repeat_interleave(self, count: int) -> None:
        """All prompts read the same row."""


class Breaks(Forgets):
    """Returns something that is no cache."""

    def forward(self, input_ids: Tensor, past_key_values: object = None, use_cache: bool = False) -> object:
        """Logits, and a tuple."""
        out = super().forward(input_ids)
        return transformers.utils.ModelOutput(logits=out.logits, past_key_values=(1, 2))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Bigram, "takes no past_key_values"),
        (Forgets, "has other logits"),
        (WritesIntoItsCache, "has other logits"),
        (Breaks, r"cache cannot be used \(\w+"),
    ],
)
def test_a_cache_that_cannot_be_used_is_not(model, why, caplog) -> None:
    """The whole prompts are run, the log says why, and the figures are right."""
    with caplog.at_level(logging.INFO, logger="step_optim"):
        policy, control = model(), chat_control()
        kl = TokenKL(policy, control, micro_batch=1, prefix=True)
    assert kl.prefix_tokens == 0
    assert any(re.search(why, line) for line in kl.fallbacks)
    assert any("shared tokens run in every prompt" in message for message in caplog.messages)
    kl.anchor()
    nudge(policy, 0.1)
    assert kl().mean > 0


@pytest.mark.parametrize("name", ["gemma2", "bigram"])
def test_a_head_that_is_not_plain_is_logged(name, caplog) -> None:
    """The fallback from hidden states to logits is told, too, and stands in the log of a run."""
    with caplog.at_level(logging.INFO, logger="step_optim"):
        kl = TokenKL(build(name), chat_control())
    assert len(kl.fallbacks) == 1
    assert kl.fallbacks[0] in caplog.text
    assert kl.describe()["fallbacks"] == list(kl.fallbacks)
    assert kl.describe()["readout"] == MODELS[name][1]


def distilled(name: str, prefix: bool) -> tuple[float, list[Tensor], float]:
    """Loss and gradients of a distillation step from a far candidate, and the size of the logits in the loss's norm."""
    model = build(name)
    kl = TokenKL(model, chat_control(), micro_batch=2, prefix=prefix)
    assert (kl.prefix_tokens > 0) == prefix
    kl.anchor()
    before = copy.deepcopy(model.state_dict())
    nudge(model, 30.0 if name == "lora" else 0.5)  # its adapters have hardly moved from zero, nor has their spread
    candidate = kl.audit()
    model.load_state_dict(before)
    parameters = [p for p in model.parameters() if p.requires_grad]
    _, loss, gradients = kl.distill(candidate, torch.full((4,), 0.5), parameters)
    logits = float(kl._reference.logits().square().sum(1).mean())
    return loss, gradients, math.sqrt(logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "lora"])
def test_gradients_reach_the_weights_through_the_cache(name) -> None:
    """Distillation behind a prefix has the gradients that it has without."""
    loss, with_prefix, logits = distilled(name, True)
    whole, without, _ = distilled(name, False)
    # The loss is the square of a distance of logits: what each way rounds of them weighs logits / distance.
    rounding = 64 * torch.finfo(torch.float32).eps * logits / math.sqrt(whole)
    assert rounding < 1e-3, "the distance is too small to be told from rounding"
    assert loss == pytest.approx(whole, rel=rounding)
    for a, b in zip(with_prefix, without, strict=True):
        assert float((a - b).norm()) <= rounding * float(b.norm())


def test_a_projected_step_behind_a_prefix() -> None:
    """The whole way: audits in inference mode, distillation with gradients, a training step afterwards."""
    model = tiny_gpt2(dropout=0.0).train()
    optimizer = STEPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.3),
        kl=TokenKL(model, chat_control(), prefix=True),
        budget=Budget(mean=1e-3),
        controller=Project(steps=2),
    )
    for _ in range(3):
        model(torch.tensor([[3, 4, 5, 6]]), labels=torch.tensor([[3, 4, 5, 6]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.last.accepted.mean <= 1e-3
    assert optimizer.summary()["projects"] + optimizer.summary()["shrinks"] > 0


class Lazy(Bigram):
    """Computes a table once, the first time it is called, and keeps it."""

    table: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scale the embeddings by the table, which training needs for its backward pass."""
        if self.table is None or self.table.shape[0] < input_ids.shape[1]:
            self.table = torch.linspace(0.5, 1.5, input_ids.shape[1])[:, None]
        return self.head(self.embedding(input_ids) * self.table[: input_ids.shape[1]])


@pytest.mark.parametrize("noise_floor", [True, False])
def test_what_a_model_keeps_from_an_audit_is_of_use_in_training(noise_floor) -> None:
    """A table that was built in an audit is taken back; what training builds itself, a backward pass goes through."""
    model = Lazy()
    kl = TokenKL(model, chat_control(), noise_floor=noise_floor)
    kl.anchor()
    kl()
    assert model.table is None
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    assert model.embedding.weight.grad is not None


def test_audits_run_in_inference_mode() -> None:
    """After the first evaluation autograd records nothing in a forward; the policy is an ordinary tensor."""
    model, modes = tiny_llama(), []
    kl = TokenKL(model, chat_control())
    model.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    kl.anchor()
    audit = kl.audit()
    assert all(modes)
    assert not audit.policy.x.is_inference()
    assert math.isclose(audit.movement.mean, 0.0)
