"""Outside edits between two steps: the reference is taken anew, and no step is charged with what somebody else did."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from step_optim import Action, Budget, ControlSet, STEPOptimizer, TokenKL
from step_optim.fingerprint import SAMPLE

VOCAB, WIDTH = 13, 6


class Model(nn.Module):
    """A trained embedding and body, a frozen head, a buffer and a tied weight; all of them matter to the policy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.body.weight
        self.head = nn.Linear(WIDTH, VOCAB)
        self.head.requires_grad_(False)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.again(torch.tanh(self.body(self.embed(input_ids)))) * self.scale)


def control_set() -> ControlSet:
    return ControlSet.from_ids([[1, 2], [3], [4, 5, 6]], [[7, 8, 9], [10], [11, 12]], slices={"a": [0], "b": [1, 2]})


def step(model: nn.Module, optimizer: Any, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    out = model(torch.randint(0, VOCAB, (4, 5), generator=generator))
    logits = out if isinstance(out, Tensor) else out.logits
    (-logits.float().log_softmax(-1)[..., 3].mean()).backward()
    optimizer.step()


def brute_force(before: nn.Module, after: nn.Module) -> float:
    """Mean over prompts of the mean over response tokens of KL(after ‖ before), in float64, one prompt at a time."""
    total, control = 0.0, control_set()
    for prompt, response in zip(control.prompts, control.responses, strict=True):
        ids = torch.cat([prompt, response])[None]
        logs = []
        for model in (after, before):
            with torch.no_grad():
                out = copy.deepcopy(model).double().eval()(ids)
            logits = out if isinstance(out, Tensor) else out.logits
            logs.append(logits[0, len(prompt) - 1 : -1].log_softmax(-1))
        total += float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    return total / len(control)


def replace(tensor: Tensor, value: Tensor) -> None:
    tensor.data = value


def swap(model: Model) -> None:
    head = nn.Linear(WIDTH, VOCAB)
    head.requires_grad_(False)
    model.head = head


EDITS: dict[str, Callable[[Model], Any]] = {
    "trained, in place": lambda m: m.body.weight.mul_(1.5),
    "trained, one element": lambda m: m.embed.weight[7, 0].add_(1.0),
    "trained, through .data": lambda m: m.body.weight.data.mul_(1.5),
    "trained, one element through .data": lambda m: m.embed.weight.data[7, 0].add_(1.0),
    "trained, .data replaced": lambda m: replace(m.body.weight, m.body.weight * 1.5),
    "trained, by its tied name": lambda m: m.again.weight.data.mul_(1.5),
    "frozen, in place": lambda m: m.head.weight.mul_(1.5),
    "frozen, one element": lambda m: m.head.weight[3, 0].add_(1.0),
    "frozen, through .data": lambda m: m.head.weight.data.mul_(1.5),
    "frozen, .data replaced": lambda m: replace(m.head.weight, m.head.weight * 1.5),
    "frozen, a small tensor's element through .data": lambda m: m.head.bias.data[3].add_(1.0),
    "buffer, in place": lambda m: m.scale.mul_(1.5),
    "buffer, through .data": lambda m: m.scale.data.mul_(1.5),
    "buffer, another object": lambda m: setattr(m, "scale", m.scale * 1.5),
    "load_state_dict": lambda m: m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items()}),
    "another module": swap,
    "a narrower dtype and back": lambda m: m.bfloat16().float(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_not_the_next_steps_movement(edit):
    """After any edit of any weight the record is the brute-force KL between the edited policy and the one after it."""
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = STEPOptimizer(
        torch.optim.AdamW(trained, lr=0.01), TokenKL(model, control_set()), budget=Budget(mean=math.inf)
    )
    for number in range(2):
        step(model, optimizer, number)
    with torch.no_grad():
        EDITS[edit](model)
    before = copy.deepcopy(model)
    step(model, optimizer, 2)
    assert optimizer.last.action is Action.COMMIT
    assert optimizer.last.accepted.mean == pytest.approx(brute_force(before, model), rel=1e-3)
    assert optimizer.last.accepted.mean > 1e-6
    untouched = copy.deepcopy(model)
    step(model, optimizer, 3)
    assert optimizer.last.accepted.mean == pytest.approx(brute_force(untouched, model), rel=1e-3)


def test_without_an_edit_nothing_is_evaluated_twice():
    """The tests above do not pass because every step takes its reference anew: it costs one control forward."""
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    kl = TokenKL(model, control_set())
    optimizer = STEPOptimizer(torch.optim.AdamW(trained, lr=0.01), kl, budget=Budget(mean=math.inf))
    calls = []
    policy, kl._policy = kl._policy, lambda: calls.append(1) or policy()
    for number in range(3):
        step(model, optimizer, number)
    assert len(calls) == 3 + 1


@pytest.mark.parametrize("how", ["merge_adapter", "unmerge_adapter", "base weight"])
def test_edits_of_an_adapted_model(how):
    """PEFT's merge writes into the frozen base weights, through `.data`."""
    from tests.models import tiny_llama

    torch.manual_seed(0)
    base = tiny_llama()
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    control = ControlSet.from_ids([[1, 2], [3], [4, 5, 6]], [[7, 8, 9], [10], [11, 12]])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = STEPOptimizer(
        torch.optim.AdamW(trained, lr=0.05), TokenKL(model, control), budget=Budget(mean=math.inf)
    )
    for number in range(2):
        step(model, optimizer, number)
    if how == "base weight":
        model.base_model.model.model.embed_tokens.weight.data.mul_(1.2)
    else:
        model.merge_adapter()
    if how == "unmerge_adapter":
        model.unmerge_adapter()
    anchors = []
    kl = optimizer._run.kl
    anchor, kl.anchor = kl.anchor, lambda audit=None: anchors.append(audit) or anchor(audit)
    before = copy.deepcopy(model)
    if how == "merge_adapter":  # merged, the adapter has no gradient, and what happens to it no effect
        for p in trained:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.last.accepted.mean == 0
    else:
        step(model, optimizer, 2)
        assert optimizer.last.accepted.mean == pytest.approx(brute_force(before, model), rel=1e-2, abs=1e-9)
    if how != "unmerge_adapter":  # which may put back the very bits
        assert anchors[0] is None


def test_the_one_edit_that_needs_a_refresh():
    """Through `.data`, of the part of a large frozen tensor that is not sampled: seen only after `refresh()`.

    To read all frozen weights would be a pass over the model at every step.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 64), nn.Linear(64, 64), nn.Linear(64, VOCAB))
    model[1].requires_grad_(False)
    assert model[1].weight.numel() > SAMPLE
    trained = [p for p in model.parameters() if p.requires_grad]
    kl = TokenKL(model, control_set())
    for refresh in (False, True):
        optimizer = STEPOptimizer(torch.optim.AdamW(trained, lr=1e-4), kl, budget=Budget(mean=math.inf))
        for number in range(2):
            step(model, optimizer, number)
        unread = torch.ones(model[1].weight.numel(), dtype=torch.bool)
        unread[:: model[1].weight.numel() // SAMPLE] = False
        model[1].weight.data.view(-1)[unread] *= 1.5
        if refresh:
            optimizer.refresh()
        before = copy.deepcopy(model)
        step(model, optimizer, 2)
        own = brute_force(before, model)
        if refresh:
            assert optimizer.last.accepted.mean == pytest.approx(own, rel=1e-2)
        else:
            assert optimizer.last.accepted.mean > 100 * own
