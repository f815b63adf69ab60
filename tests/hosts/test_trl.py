"""STEP inside TRL's SFT and GRPO with LoRA: the bare run's bits, budgets that hold, exact resumes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model

from step_optim import Action, Gate, STEPOptimizer, TokenKL
from tests.hosts.text import (
    SteppedText,
    after_create_optimizer,
    check_resume,
    check_text_host,
    forget_accelerator,
    innermost,
    own_optimizers,
    policy,
    quiet,
    seeded,
    trained,
)
from tests.models import ragged_control
from tests.strategies import bits

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))
from tiny import byte_tokenizer

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Leave no shared state to other tests."""
    yield
    forget_accelerator()


def sft(folder: Path, model: Any, optimizers: Any = (None, None), **options: Any) -> Any:
    """TRL's supervised trainer."""
    return trl.SFTTrainer(
        model,
        quiet(trl.SFTConfig, folder, **options),
        train_dataset=datasets.Dataset.from_dict({"text": ["one fish", "two fish", "red fish", "blue fish"] * 4}),
        processing_class=byte_tokenizer(),
        peft_config=None if hasattr(model, "peft_config") else LORA,
        optimizers=optimizers,
    )


def grpo(folder: Path, model: Any, optimizers: Any = (None, None), **options: Any) -> Any:
    """TRL's GRPO, rewarded for letters."""

    def letters(completions: list[str], **_: Any) -> list[float]:
        return [sum(character.isalpha() for character in text) / 8 for text in completions]

    return trl.GRPOTrainer(
        model,
        letters,
        quiet(trl.GRPOConfig, folder, num_generations=2, max_completion_length=8, **options),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["one", "two", "red", "blue"] * 4}),
        processing_class=byte_tokenizer(),
        peft_config=None if hasattr(model, "peft_config") else LORA,
        optimizers=optimizers,
    )


HOSTS = pytest.mark.parametrize("host", [sft, grpo])
WAYS = pytest.mark.parametrize("way", [own_optimizers, after_create_optimizer])


def make(host: Any, way: Any, wrap: Any, folder: Path, **options: Any) -> Any:
    """With the user's own optimizer the LoRA is there before the trainer; else the trainer adds it."""

    def build() -> Any:
        model = policy(vocab=len(byte_tokenizer()))
        return way(host, wrap, folder, get_peft_model(model, LORA) if way is own_optimizers else model, **options)

    return seeded(build)


@WAYS
@HOSTS
def test_trl_is_bit_identical_and_holds_budgets(host, way, tmp_path):
    """Bare and measured runs agree in adapters, state, completions and logs; shrinks and rejections are exact."""
    options = {"save_strategy": "no", "max_steps": 3}
    measured, _, _ = check_text_host(lambda wrap: trained(make(host, way, wrap, tmp_path, **options)))
    assert len(measured.records) == 3


@WAYS
@HOSTS
def test_trl_resumes_to_the_bit(host, way, tmp_path):
    """A run resumed from its third step's checkpoint is the uninterrupted run: bits, decisions, logs and counters."""
    check_resume(lambda wrap, folder: make(host, way, wrap, folder), tmp_path)


@HOSTS
def test_trl_with_its_own_precision_is_bit_identical_and_holds_budgets(host, tmp_path):
    """TRL's defaults are autocast to bf16 and gradient checkpointing; audits read fp32 under them."""
    options = {"bf16": True, "gradient_checkpointing": True, "max_steps": 2, "save_strategy": "no"}
    check_text_host(lambda wrap: trained(make(host, after_create_optimizer, wrap, tmp_path, **options)))


@HOSTS
def test_a_trainer_whose_every_step_is_rejected_trains_nothing(host, tmp_path):
    """Adapters and optimizer state stay as they were; steps and the schedule go on."""
    gate = SteppedText(0.0, Gate)
    trainer = make(host, after_create_optimizer, gate, tmp_path, max_steps=3, save_strategy="no")
    before = [bits(p) for p in trainer.model.parameters()]
    trainer.train()
    assert [record.action for record in gate.records] == [Action.REJECT] * 3
    assert [bits(p) for p in trainer.model.parameters()] == before
    assert not innermost(trainer.optimizer).state
    assert trainer.state.global_step == 3
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0


@HOSTS
def test_an_optimizer_made_before_trl_adds_the_lora_trains_nothing_and_the_record_says_so(host, tmp_path):
    """With peft_config= the parameters that `optimizers=` was given are frozen: every step is `unchanged`, and told."""

    def build() -> Any:
        model = policy(vocab=len(byte_tokenizer()))
        kl, records = TokenKL(model, ragged_control()), []
        optimizer = STEPOptimizer(
            torch.optim.AdamW(model.parameters(), lr=2e-2),
            kl=kl,
            budget=math.inf,
            log=lambda record, _: records.append(record["action"]),
        )
        return host(tmp_path, model, (optimizer, None), max_steps=2, save_strategy="no"), records

    trainer, actions = seeded(build)
    with pytest.warns(UserWarning, match=r"none of the optimizer's 12 parameters has a gradient, and 12 of them"):
        trainer.train()
    assert actions == ["unchanged", "unchanged"]
    assert not any(p.any() for name, p in trainer.model.named_parameters() if "lora_B" in name)
