"""Shrinking by layer: another way to the candidate, and everything else as on the straight one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from step_optim import Budget, Controller, Interpolate, PolicyKL, STEPOptimizer, TokenKL
from step_optim.controllers import Search
from step_optim.controllers.layers import depths, layer_weights
from step_optim.snapshot.path import Path
from tests.models import ragged_control, tiny_llama
from tests.snapshot.test_points import Master

POSITIVE = st.floats(1e-3, 1e3)


def brute_force(weights: list[float], squares: list[float], alpha: float) -> list[float]:
    """Bisect the scale of which alpha of the whole step is made."""
    low, high = 0.0, 1 / min(weights)
    for _ in range(200):
        scale = 0.5 * (low + high)
        made = sum(min(1.0, scale * w) * q for w, q in zip(weights, squares, strict=True)) / sum(squares)
        low, high = (scale, high) if made < alpha else (low, scale)
    return [min(1.0, high * w) for w in weights]


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=6), st.floats(1e-6, 1 - 1e-6))
def test_parts_are_those_of_the_brute_force(layers, alpha) -> None:
    """Alpha of the whole step is made; a layer of more weight is never behind; parts are at most 1."""
    weights, squares = (list(values) for values in zip(*layers, strict=True))
    parts = Path(weights, squares).parts(alpha)
    assert parts == pytest.approx(brute_force(weights, squares, alpha), rel=1e-6)
    assert sum(p * q for p, q in zip(parts, squares, strict=True)) == pytest.approx(alpha * sum(squares), rel=1e-9)
    for (w, p), (v, o) in itertools.combinations(zip(weights, parts, strict=True), 2):
        assert (w - v) * (p - o) >= -1e-12 * abs(w - v)


@given(st.lists(POSITIVE, min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1))
def test_parts_grow_with_alpha_and_end_exactly(weights, a, b) -> None:
    path = Path(weights, [1.0] * len(weights))
    one, other = path.parts(min(a, b)), path.parts(max(a, b))
    assert all(x <= y + 1e-12 for x, y in zip(one, other, strict=True))
    assert path.parts(0) == [0.0] * len(weights)
    assert path.parts(1) == [1.0] * len(weights)


def test_what_does_not_move_makes_no_difference() -> None:
    assert Path([1.0, 2.0], [1.0, 0.0]).parts(0.25) == [0.25, 0.5]
    assert Path([1.0, 3.0], [0.0, 0.0]).parts(0.5) == [0.25, 0.75]
    with pytest.raises(ValueError, match="must be numbers above 0"):
        Path([1.0, 0.0], [1.0, 1.0])


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_depth_is_read_from_the_numbers_of_the_names() -> None:
    """Embeddings first, the head last; adapters are where their layer is; a decoder follows its encoder."""
    gpt = depths(names(GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=11, n_positions=16))))
    assert gpt["transformer.wte.weight"] == 0
    assert gpt["transformer.h.0.attn.c_attn.weight"] == gpt["transformer.h.0.mlp.c_fc.bias"] == 1
    assert gpt["transformer.h.2.ln_1.weight"] == 3
    assert gpt["transformer.ln_f.bias"] == 4

    lora = peft.get_peft_model(tiny_llama(layers=2), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    found = depths(names(lora))
    assert {found[name] for name in found if "layers.1." in name and "lora" in name} == {2}
    assert max(found.values()) == 3

    t5 = T5ForConditionalGeneration(
        T5Config(num_layers=2, num_decoder_layers=2, d_model=8, d_kv=4, d_ff=8, num_heads=2, vocab_size=11)
    )
    deep = depths(names(t5))
    assert (
        deep["encoder.block.1.layer.0.SelfAttention.q.weight"] < deep["decoder.block.0.layer.0.SelfAttention.q.weight"]
    )

    assert depths(["0.weight", "0.bias", "2.weight"]) == {"0.weight": 0, "0.bias": 0, "2.weight": 1}


@pytest.mark.parametrize(
    ("by_layer", "error", "message"),
    [
        ("quadratic", ValueError, "'quadratic' is unknown; use 'linear'"),
        ({}, ValueError, "no pattern"),
        ({"*.q*": 0.0}, ValueError, r"\['\*.q\*'\]=0.0 must be a number above 0"),
        ({"*": math.nan}, ValueError, "must be a number above 0"),
        (3, TypeError, "by_layer=3"),
    ],
)
def test_bad_rules_are_refused_at_construction(by_layer, error, message) -> None:
    with pytest.raises(error, match=message):
        Interpolate(by_layer=by_layer)


def test_rules_that_name_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the 2 names that are known"):
        layer_weights("linear", ["weight", "bias"])
    with pytest.raises(ValueError, match=r"no parameter is left for the pattern 'head\*'"):
        layer_weights({"*": 1.0, "head*": 2.0}, ["body", "head"])
    with pytest.raises(ValueError, match=r"by_layer\('weight'\)=-1 must be"):
        layer_weights(lambda _: -1, ["weight"])


class Net:
    """A deep policy that is pushed too far."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        self.inputs = torch.randn(8, 4).to(dtype)
        self.kl = PolicyKL(lambda: self.model(self.inputs), {"a": range(3)}, model=self.model, noise_floor=False)

    def push(self) -> None:
        self.model.zero_grad()
        self.model(self.inputs).float().log_softmax(-1)[:, 0].mean().neg().backward()


RULES = st.sampled_from(["linear", {"0.*": 0.2, "4.*": 3.0}, lambda name: 1.0 + ("bias" in name)])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), RULES, st.floats(1e-5, 1e-2), st.floats(1e-5, 1e-2), st.sampled_from([0.03, 0.3]))
def test_budgets_hold_and_what_is_committed_are_the_recorded_parts(seed, rule, mean, part_a, lr) -> None:
    net = Net(seed)
    optimizer = STEPOptimizer(
        torch.optim.SGD(net.model.parameters(), lr=lr),
        kl=net.kl,
        budget=Budget(mean=mean, slices={"a": part_a}),
        controller=Interpolate(by_layer=rule),
    )
    for _ in range(3):
        net.push()
        before = [p.detach().clone() for p in net.model.parameters()]
        steps = [p.detach() - lr * p.grad for p in net.model.parameters()]
        optimizer.step()
        record = optimizer.last
        assert record.accepted.mean <= mean
        assert record.accepted.slices["a"] <= part_a
        if str(record.action) != "shrink":
            continue
        layers = layer_weights(rule, names(net.model))
        for (name, p), old, candidate in zip(net.model.named_parameters(), before, steps, strict=True):
            torch.testing.assert_close(p.detach(), old + record.layers[layers[name][0]] * (candidate - old))
        assert record.alpha_realised == pytest.approx(record.alpha, rel=1e-3)


def test_equal_weights_are_the_straight_line() -> None:
    ends = []
    for rule in (None, lambda _: 2.5):
        net = Net(3)
        optimizer = STEPOptimizer(
            torch.optim.Adam(net.model.parameters(), lr=0.1),
            kl=net.kl,
            budget=1e-3,
            controller=Interpolate(by_layer=rule),
        )
        for _ in range(4):
            net.push()
            optimizer.step()
        ends.append([p.detach().clone() for p in net.model.parameters()])
    assert optimizer.summary()["shrinks"] > 0
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_copies_and_bfloat16_weights_move_along() -> None:
    """A bfloat16 weight is its rounded master on the bent way, too; what rounding leaves is foretold by layer."""
    net = Net(1, torch.bfloat16)
    optimizer = STEPOptimizer(
        Master(net.model.parameters(), lr=1.0),
        kl=net.kl,
        budget=1e-3,
        controller=Interpolate(by_layer="linear"),
        param_like="master",
    )
    plain = Net(1, torch.bfloat16)
    coarse = STEPOptimizer(
        torch.optim.SGD(plain.model.parameters(), lr=1.0),
        kl=plain.kl,
        budget=1e-3,
        controller=Interpolate(by_layer="linear"),
    )
    for _ in range(3):
        net.push(), plain.push()
        optimizer.step(), coarse.step()
        for p in net.model.parameters():
            assert torch.equal(p, optimizer.state[p]["master"].bfloat16())
        assert optimizer.last.accepted.mean <= 1e-3
        assert coarse.last.accepted.mean <= 1e-3
    assert optimizer.summary()["shrinks"] > 0
    assert coarse.summary()["shrinks"] > 0


def test_language_models_under_lora() -> None:
    """By name through PEFT; the record has a part for every depth that is trained, growing with it."""
    model = peft.get_peft_model(tiny_llama(layers=3), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    optimizer = STEPOptimizer(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05),
        kl=TokenKL(model, ragged_control(), noise_floor=False),
        budget=1e-5,
        controller=Interpolate(by_layer="linear"),
    )
    model(ragged_control().prompts[0][None]).logits.square().mean().backward()
    optimizer.step()
    assert str(optimizer.last.action) == "shrink"
    assert list(optimizer.last.layers) == ["layer 1", "layer 2", "layer 3"]
    parts = list(optimizer.last.layers.values())
    assert parts == pytest.approx([parts[0], 1.5 * parts[0], 2 * parts[0]])


def test_a_policy_without_names_is_refused_and_rolled_back() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    inputs = torch.eye(2)
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=10.0),
        kl=PolicyKL(lambda: inputs @ weight, noise_floor=False),
        budget=1e-3,
        controller=Interpolate(by_layer="linear"),
    )
    weight.grad = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match="no tensor of the optimizer is a named parameter"):
        optimizer.step()
    assert torch.equal(weight, torch.zeros(2, 3))


@pytest.mark.parametrize("rule", [None, "linear"])
def test_a_search_may_leave_the_way(rule) -> None:
    """A feasible point off it is committed, without parts by layer."""

    class Aside(Search):
        name = "aside"

        def find(self, trial):
            ends = zip(trial.weights.previous, trial.weights.candidate, strict=True)
            return trial.at_weights([torch.lerp(a, b, 1e-3) for a, b in ends])

    net = Net(0)
    optimizer = STEPOptimizer(
        torch.optim.SGD(net.model.parameters(), lr=1.0),
        kl=net.kl,
        budget=1e-4,
        controller=Interpolate(search=Aside(), by_layer=rule),
    )
    net.push()
    optimizer.step()
    assert str(optimizer.last.action) == "project"
    assert optimizer.last.layers == {}


def test_a_way_is_chosen_before_others_are_measured() -> None:
    class Late(Controller):
        def decide(self, trial):
            trial.at(0.5)
            trial.bend([1.0] * len(trial.weights.previous))

    net = Net(0)
    optimizer = STEPOptimizer(
        torch.optim.SGD(net.model.parameters(), lr=1.0), kl=net.kl, budget=1e-5, controller=Late()
    )
    net.push()
    with pytest.raises(RuntimeError, match="call it first"):
        optimizer.step()
    assert math.isnan(optimizer.last.candidate.mean)


def test_what_no_module_names_has_the_weight_one_and_a_layer_of_its_own() -> None:
    """A bare log_std of a policy, under a mapping."""
    net = Net(0)
    log_std = nn.Parameter(torch.zeros(3))
    kl = PolicyKL(
        lambda: torch.distributions.Independent(torch.distributions.Normal(net.model(net.inputs), log_std.exp()), 1),
        noise_floor=False,
    )
    optimizer = STEPOptimizer(
        torch.optim.SGD([*net.model.parameters(), log_std], lr=0.5),
        kl=kl,
        budget=1e-4,
        controller=Interpolate(by_layer={"0.*": 3.0}),
    )
    (net.model(net.inputs).square().mean() + log_std.sum()).backward()
    optimizer.step()
    layers = optimizer.last.layers
    assert set(layers) == {"0.*", "others", "unnamed"}
    assert layers["unnamed"] == pytest.approx(layers["others"]) == pytest.approx(layers["0.*"] / 3)


def test_depths_of_a_second_model_are_seen() -> None:
    """The layers of body and head, where the policy is a function of both."""
    body, head = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs = torch.randn(8, 4)
    optimizer = STEPOptimizer(
        torch.optim.SGD([*body.parameters(), *head.parameters()], lr=1.0),
        kl=PolicyKL(lambda: head(body(inputs)), noise_floor=False),
        budget=1e-5,
        controller=Interpolate(by_layer="linear"),
    )
    head(body(inputs)).square().mean().backward()
    optimizer.step()
    assert len(optimizer.last.layers) == 3


def test_a_rule_that_does_not_fit_is_refused_when_the_model_is_known() -> None:
    """Before any step; and a tied head goes by either of its names."""
    model = tiny_llama(tied=True)
    kl = TokenKL(model, ragged_control(), noise_floor=False)
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"'haed\.\*'"):
        STEPOptimizer(inner, kl=kl, budget=0.1, controller=Interpolate(by_layer={"haed.*": 2.0}))
    optimizer = STEPOptimizer(inner, kl=kl, budget=1e-6, controller=Interpolate(by_layer={"lm_head.*": 2.0}))
    model(ragged_control().prompts[0][None]).logits.square().mean().backward()
    optimizer.step()
    assert optimizer.last.layers["lm_head.*"] == pytest.approx(2 * optimizer.last.layers["others"])


def test_rules_are_values() -> None:
    """A controller with a mapping is hashable, numbers of numpy count as numbers, and keys are texts."""
    assert hash(Interpolate(by_layer={"*": 2.0})) == hash(Interpolate(by_layer={"*": 2.0}))
    assert Interpolate(by_layer={"*": np.float32(0.5)}).by_layer == {"*": 0.5}
    with pytest.raises(TypeError, match="0 is no pattern"):
        Interpolate(by_layer={0: 0.5})


def test_parts_of_very_different_weights() -> None:
    """No cancellation: the share of the step is what was asked for."""
    weights, squares = [1.4e-7, 8.3e-9, 8.4e8, 1766.0], [0.1, 0.1, 2.0, 2.0]
    for alpha in (1e-9, 0.3, 0.95, 0.98, 1 - 1e-9):
        parts = Path(weights, squares).parts(alpha)
        made = sum(p * q for p, q in zip(parts, squares, strict=True)) / sum(squares)
        assert made == pytest.approx(alpha, rel=1e-9)
