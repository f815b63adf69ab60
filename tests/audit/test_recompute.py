"""Gradients that compute layers again: what they keep in memory, when it is done, and what it leaves behind."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from step_optim import ControlSet, TokenKL
from step_optim.audit.recompute import layers_of, recomputed
from tests.models import VOCAB, Bigram, nudge, ragged_control, tiny_gpt2, tiny_llama

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "bench"))
import measure

CPU = torch.device("cpu")


def prompts(seed: int) -> ControlSet:
    """Twelve prompts of 24 tokens with 8 of response."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(1, VOCAB, (count,), generator=generator) for _ in range(12) for count in (24, 8)]
    return ControlSet.from_ids(draws[::2], draws[1::2])


def gradient(model: nn.Module, recompute: bool | None) -> tuple[list[Tensor], int, int]:
    """Of the drift on a draw: the gradient, its peak memory, and an audit's."""
    kl = TokenKL(model, prompts(0), pool=prompts(1), noise_floor=False, recompute=recompute)
    kl.anchor()
    nudge(model, 0.1, seed=3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    draw = kl.draw(12, 0, ["drift"])
    (normal,) = kl.gradients(["drift"], parameters, draw)
    audit = measure.peak_bytes(lambda: kl(), CPU)
    return normal.gradient, measure.peak_bytes(lambda: kl.gradients(["drift"], parameters, draw), CPU), audit


def lora(layers: int) -> Any:
    """A Llama of many layers of which hardly anything is trained: the gradients themselves are small."""
    model = tiny_llama(layers=layers, hidden=64).requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    return model.train()


def test_memory_is_at_most_twice_an_audits() -> None:
    """With thirty layers, where it is many times that otherwise; and the gradient is the same."""
    model = lora(30)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    plain, much, _ = gradient(model, None)
    model.load_state_dict(state)
    again, little, audit = gradient(model, True)
    assert little <= 2 * audit
    assert much >= 6 * audit
    for found, wanted in zip(again, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-9)


class Calls:
    """How often a module was run with a graph."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        module.register_forward_hook(self.note)

    def note(self, *_: object) -> None:
        self.count += torch.is_grad_enabled()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_done_as_in_training_unless_said_otherwise(build, asked, checkpointing) -> None:
    """Enabled before or after the closure was built; the model is left as it was found."""
    model = build(layers=2).train()
    kl = TokenKL(model, ragged_control(), noise_floor=False, recompute=asked)
    if checkpointing:
        model.gradient_checkpointing_enable()
    kl.anchor()
    nudge(model, 0.1, seed=3)
    inside = [next(layer.children()) for layer in layers_of(model)]
    calls = [Calls(module) for module in inside]
    before = [dict(vars(module)) for module in model.modules()]
    kl.gradients(["drift"], list(model.parameters()))
    alone = len(kl.control)
    recomputes = checkpointing if asked is None else asked
    assert [each.count for each in calls] == [2 * alone if recomputes else len(kl._layout.batches)] * 2
    assert [dict(vars(module)) for module in model.modules()] == before


class Overwriting(nn.Module):
    """A layer that adds to what it was given, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return tanh(W x) + x, and write it over x."""
        moved = torch.tanh(self.linear(x.clone()))
        x += moved
        return x.sin()


class Stack(nn.Module):
    """A policy of such layers."""

    def __init__(self, *, by_position: bool) -> None:
        super().__init__()
        self.by_position = by_position
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 4)
        self.layers = nn.ModuleList([Overwriting(), Overwriting()])
        self.head = nn.Linear(4, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x.clone()) if self.by_position else layer(x=x.clone())
        return self.head(x)


@pytest.mark.parametrize("by_position", [True, False])
def test_a_layer_that_overwrites_its_input_is_refused(by_position) -> None:
    """At construction: computed again from what it wrote it would be another."""
    with pytest.raises(ValueError, match=r"layers of Stack cannot run again.*modified by an inplace operation"):
        TokenKL(Stack(by_position=by_position), ragged_control(), noise_floor=False, recompute=True)


class Counting(nn.Module):
    """A layer that counts its calls, and computes with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        """Return x + n tanh(W x), with n = 1, 2, 1, 2, ..."""
        self.calls += 1
        return x + (2 - self.calls % 2) * torch.tanh(self.linear(x))


def test_a_layer_that_keeps_a_state_is_refused() -> None:
    """At construction: it would have been run an odd number of times when it runs again."""
    model = Stack(by_position=True)
    model.layers = nn.ModuleList([Counting()])
    with pytest.raises(ValueError, match="layers of Stack compute something else when they run again"):
        TokenKL(model, ragged_control(), noise_floor=False, recompute=True)


def test_a_penalty_is_made_of_one_forward_as_ever() -> None:
    """Its graph is kept whole for the user's backward pass: nothing is computed again, and batches are not cut."""
    model = tiny_llama(layers=2).train()
    model.gradient_checkpointing_enable()
    kl = TokenKL(model, ragged_control(), noise_floor=False)
    kl.anchor()
    calls = Calls(next(next(layers_of(model)).children()))
    kl.penalty(prompts=len(kl.control)).backward()
    assert calls.count == 1


def test_patched_forwards_come_back() -> None:
    """A layer whose forward was replaced by somebody else keeps that one; a list in a list is opened, too."""
    model = tiny_llama(layers=2)
    mine = model.model.layers[1].forward
    model.model.layers[1].forward = mine
    with recomputed(model):
        assert all("forward" in vars(layer) for layer in model.model.layers)
    assert "forward" not in vars(model.model.layers[0])
    assert vars(model.model.layers[1])["forward"] is mine
    inner = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)]), nn.Linear(1, 1)])
    assert list(layers_of(nn.ModuleDict({"stack": inner}))) == [inner[0][0], inner[1]]


@pytest.mark.parametrize(
    ("recompute", "error", "match"),
    [
        ("yes", TypeError, "recompute='yes' is none of"),
        (True, ValueError, "recompute=True: Bigram has no nn.ModuleList"),
    ],
)
def test_what_cannot_be_done_is_refused(recompute, error, match) -> None:
    """At construction."""
    with pytest.raises(error, match=match):
        TokenKL(Bigram(), ragged_control(), recompute=recompute)
