"""The transaction on a real pretrained language model with LoRA and an 8-bit optimizer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from step_optim import Action, Budget, ControlSet, Project, STEPOptimizer, TokenKL
from tests.strategies import picture

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def smollm():
    """SmolLM2-135M-Instruct and its tokenizer, from the packaged weights if there is no network."""
    from smollm import DEFAULT_MODEL, find, load

    return load(find(DEFAULT_MODEL))


def test_commit_reject_shrink_and_project_on_a_pretrained_model(smollm):
    """All four outcomes, with AdamW8bit over LoRA: budgets hold on the committed bits, a rejection leaves no trace."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    base, tokenizer = smollm
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    control = ControlSet.from_texts(
        tokenizer,
        [[{"role": "user", "content": "Capital of France?"}], [{"role": "user", "content": "What is 2 + 3?"}]],
        ["The capital of France is Paris.", "2 + 3 = 5."],
        slices={"fact": [0], "math": [1]},
    )
    kl = TokenKL(model, control)
    assert kl.readout == "hidden"
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = bnb.optim.AdamW8bit(trained, lr=1e-3, weight_decay=0.0)
    optimizer = STEPOptimizer(inner, kl=kl, budget=Budget(mean=10.0, slices=10.0))
    ids = tokenizer("Once upon a time there was a small robot.", return_tensors="pt")["input_ids"]

    def backward() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    backward()
    optimizer.step()
    backward()
    optimizer.step()
    assert optimizer.last.action is Action.COMMIT
    assert optimizer.last.candidate.mean > 1e-6
    assert any(state["state1"].dtype is torch.uint8 for state in inner.state.values())

    reference = kl._reference
    optimizer.set_budget(Budget(mean=optimizer.last.candidate.mean / 4))
    backward()
    optimizer.step()
    assert optimizer.last.action is Action.SHRINK
    assert optimizer.last.audits <= 6
    committed, kl._reference = kl._reference, reference
    assert kl() == optimizer.last.accepted
    kl._reference = committed

    optimizer.controller = Project(steps=1)
    optimizer.set_budget(Budget(slices={"math": optimizer.last.accepted.slices["math"] / 4}))
    backward()
    optimizer.step()
    assert optimizer.last.action in (Action.PROJECT, Action.SHRINK)
    assert optimizer.last.projection["residual"] <= optimizer.last.projection["residual_interpolation"]

    optimizer.set_budget(Budget(mean=0.0))
    backward()
    before = picture(model, optimizer)
    optimizer.step()
    assert optimizer.last.action is Action.REJECT
    assert picture(model, optimizer) == before
    model.unload()
