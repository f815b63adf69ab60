"""STEP inside the Hugging Face Trainer: the bare run's bits, budgets that hold, exact resumes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from step_optim import Action, Budget, Gate
from tests.hosts.common import bare
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
    texts,
    trained,
)
from tests.strategies import bits

WAYS = [own_optimizers, after_create_optimizer]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Leave no shared state to other tests."""
    yield
    forget_accelerator()


def build(folder: Path, model: Any, optimizers: Any = (None, None), **options: Any) -> transformers.Trainer:
    """The Trainer, with two batches accumulated in each step, and clipping as it does by default."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} | options
    return transformers.Trainer(
        model,
        quiet(transformers.TrainingArguments, folder, **options),
        train_dataset=texts(),
        eval_dataset=texts(2),
        optimizers=optimizers,
    )


def make(way: Any, wrap: Any, folder: Path, **options: Any) -> transformers.Trainer:
    return seeded(lambda: way(build, wrap, folder, policy(), **options))


@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_is_bit_identical_and_holds_budgets(way, tmp_path):
    """Bare and measured runs agree in weights, state and logs; shrinks and rejections are exact."""
    measured, _, _ = check_text_host(lambda wrap: trained(make(way, wrap, tmp_path, save_strategy="no", max_steps=4)))
    assert len(measured.records) == 4  # one for each step, not for each batch


@pytest.mark.parametrize("way", WAYS)
def test_the_trainer_resumes_to_the_bit(way, tmp_path):
    """A run resumed from its third step's checkpoint is the uninterrupted run: bits, decisions, logs and counters."""
    check_resume(lambda wrap, folder: make(way, wrap, folder), tmp_path)


def test_the_trainer_in_bf16_is_bit_identical_and_holds_budgets(tmp_path):
    """With bf16=True the training forward is autocast, the audits are not."""
    check_text_host(
        lambda wrap: trained(make(after_create_optimizer, wrap, tmp_path, bf16=True, save_strategy="no", max_steps=2))
    )


def test_a_trainer_whose_every_step_is_rejected_trains_nothing(tmp_path):
    """Weights and optimizer state stay as they were; steps and the schedule go on."""
    gate = SteppedText(0.0, Gate)
    trainer = make(after_create_optimizer, gate, tmp_path, max_steps=3, save_strategy="no")
    before = [bits(p) for p in trainer.model.parameters()]
    trainer.train()
    assert [record.action for record in gate.records] == [Action.REJECT] * 3
    assert [bits(p) for p in trainer.model.parameters()] == before
    assert not innermost(trainer.optimizer).state
    assert trainer.state.global_step == 3
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0


def test_checkpoints_of_bare_and_wrapped_trainers_are_interchangeable(tmp_path):
    """Either resumes the other's, and ends in the same bits; there is nothing to convert."""
    alone = trained(make(after_create_optimizer, bare, tmp_path / "bare"))
    trained(make(after_create_optimizer, SteppedText(math.inf), tmp_path / "step"))
    for saved, wrap in (("bare", SteppedText(math.inf)), ("step", bare)):
        resumed = make(after_create_optimizer, wrap, tmp_path / "resumed")
        assert trained(resumed, resume=tmp_path / saved / "checkpoint-3") == alone


def test_the_trainer_switches_schedule_free_optimizers_through_step(tmp_path):
    """optim="schedule_free_adamw" is evaluated every step with the averaged weights, as with the bare one."""
    pytest.importorskip("schedulefree")
    options = {
        "optim": "schedule_free_adamw",
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 3,
        "save_strategy": "no",
    }

    def loop(wrap: Any) -> dict[str, Any]:
        left = trained(make(after_create_optimizer, wrap, tmp_path, **options))
        assert str(left["log"]).count("eval_loss") == 3
        return left

    check_text_host(loop)


def test_budgets_of_slices_hold_inside_the_trainer(tmp_path):
    """Each slice keeps to its own, in every step."""
    held = SteppedText(Budget(mean=math.inf, slices={"early": 1e-3, "late": 1e-2}))
    trainer = make(after_create_optimizer, held, tmp_path, save_strategy="no")
    trainer.train()
    assert Action.SHRINK in held.actions()
    for record in held.records:
        assert record.accepted.slices["early"] <= 1e-3
        assert record.accepted.slices["late"] <= 1e-2
