"""STEP inside accelerate, the Hugging Face Trainer and TRL: the bare run's bits, budgets that hold, exact resumes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
import transformers
import trl
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from step_optim import Action, Budget, Controller, Gate, Interpolate, STEPOptimizer, TokenKL
from tests.models import VOCAB, ragged_control, tiny_llama
from tests.strategies import bits, picture

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from tiny import byte_tokenizer

MEASURE = Budget(mean=math.inf)
NOT_OF_THE_RUN = ("runtime", "per_second", "step_time", "train_loss", "num_tokens")
"""Logged figures that are times, or that a trainer counts from zero after a resume."""


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Forget the state that accelerate shares between all its objects."""
    forget_accelerator()
    yield
    forget_accelerator()


def forget_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass
class Step:
    """How STEP is put around an optimizer, and what it records there."""

    budget: Budget
    controller: Controller = field(default_factory=Interpolate)
    records: list[dict[str, Any]] = field(default_factory=list)

    def around(self, optimizer: torch.optim.Optimizer, model: Any) -> STEPOptimizer:
        return STEPOptimizer(
            optimizer,
            kl=TokenKL(model, ragged_control()),
            budget=self.budget,
            controller=self.controller,
            log=lambda record, _: self.records.append(record | {"seconds": None}),
        )

    @property
    def candidates(self) -> list[float]:
        return [record["candidate"]["mean"] for record in self.records]

    def acts_on(self, measured: Step) -> bool:
        """Whether it interfered, kept every step within its budget, and was the same run until then."""
        accepted = [record["accepted"]["mean"] for record in self.records]
        return (
            any(record["triggered"] for record in self.records)
            and all(kl <= self.budget.mean for kl in accepted)
            and max(measured.candidates) > self.budget.mean
            and self.candidates[0] == measured.candidates[0]
        )


def binding(measured: Step, controller: Controller | None = None) -> Step:
    """A budget of a quarter of the first step that was measured."""
    return Step(Budget(mean=measured.candidates[0] / 4), controller or Interpolate())


def policy(seed: int = 0, vocab: int = VOCAB) -> Any:
    """A tiny Llama whose training draws random numbers."""
    model = tiny_llama(vocab=vocab, seed=seed)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return model


def texts(count: int = 16) -> list[dict[str, list[int]]]:
    """Token ids to train on."""
    ids = torch.randint(3, VOCAB, (count, 8), generator=torch.Generator().manual_seed(7)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def ending(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All bits that two equal runs have in common at their end."""
    inner = innermost(optimizer)
    taken = picture(model, inner)
    return {name: taken[name] for name in ("parameters", "buffers", "groups", "rng")} | {
        "state": bits(list(inner.state.values()))
    }


def counters(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `summary` says about the whole run, but for times."""
    while not isinstance(optimizer, STEPOptimizer):
        optimizer = optimizer.optimizer
    return {name: value for name, value in optimizer.summary().items() if "second" not in name}


# accelerate


@dataclass
class Run:
    """A training loop with accelerate, as its documentation writes it."""

    accelerator: Accelerator
    model: Any
    optimizer: Any
    scheduler: Any
    losses: list[float] = field(default_factory=list)

    def train(self, batches: Any, accumulation_done: Callable[[int], None] = lambda i: None) -> None:
        for i, batch in enumerate(batches):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                    accumulation_done(i)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.item())

    def ending(self) -> dict[str, Any]:
        return ending(self.model, self.optimizer) | {"losses": self.losses}


def tensors(count: int = 10) -> list[dict[str, torch.Tensor]]:
    """Batches of two texts."""
    rows = [torch.tensor(text["input_ids"]) for text in texts(2 * count)]
    return [{name: torch.stack(rows[i : i + 2]) for name in ("input_ids", "labels")} for i in range(0, 2 * count, 2)]


def start(
    step: Step | None,
    *,
    seed: int = 0,
    accumulation: int = 2,
    scaler: bool = False,
    make: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=3e-2),
    **options: Any,
) -> Run:
    forget_accelerator()
    transformers.set_seed(seed)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)
    if scaler:  # accelerate makes one for fp16, which it refuses on a CPU
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    model = policy(seed)
    optimizer = make(model.parameters())
    optimizer = optimizer if step is None else step.around(optimizer, model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return Run(accelerator, *accelerator.prepare(model.train(), optimizer, scheduler))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_is_bit_identical_at_an_infinite_budget_and_holds_a_finite_one(precision):
    """prepare, accumulate with a short last group, clip_grad_norm_, a scheduler; audits only when a step is taken."""
    endings, measured = [], Step(MEASURE)
    for step in (None, measured):
        run = start(step, mixed_precision=precision)
        run.train(run.accelerator.prepare(DataLoader(texts(10), batch_size=2, collate_fn=collate)))
        endings.append(run.ending())
    assert endings[0] == endings[1]
    assert len(measured.records) == 3  # 5 batches in groups of 2

    held = binding(measured)
    run = start(held, mixed_precision=precision)
    run.train(run.accelerator.prepare(DataLoader(texts(10), batch_size=2, collate_fn=collate)))
    assert held.acts_on(measured)
    assert run.optimizer.optimizer.last.action is Action.SHRINK


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_accelerate_knows_overflows_and_step_knows_rejections():
    """A rejection leaves the bits as they were and `step_was_skipped` set, on the wrapper; the scheduler goes on."""
    run = start(Step(Budget(mean=0.0), Gate()))
    before = ending(run.model, run.optimizer)
    run.train(tensors(2))
    assert run.optimizer.optimizer.step_was_skipped
    assert not run.accelerator.optimizer_step_was_skipped  # accelerate asks its scaler alone
    after = ending(run.model, run.optimizer)
    assert all(before[part] == after[part] for part in ("parameters", "buffers", "state"))
    assert run.scheduler.get_last_lr() == [pytest.approx(3e-2 * 0.9)]


def test_steps_that_a_grad_scaler_skips_are_skipped_under_step_too():
    """An overflow in the second of four steps: no proposal, no record, the same scale and bits as bare."""
    endings, measured = [], Step(MEASURE)
    for step in (None, measured):
        run = start(step, scaler=True, accumulation=1)
        skipped = []

        def overflow(i: int, run: Run = run, skipped: list[bool] = skipped) -> None:
            skipped.append(run.optimizer.step_was_skipped)
            if i == 1:
                run.model.lm_head.weight.grad[0, 0] = math.inf

        run.train(tensors(4), overflow)
        endings.append((run.ending(), run.accelerator.scaler.state_dict(), skipped))
    assert endings[0] == endings[1]
    assert endings[1][2] == [False, False, True, False]
    assert len(measured.records) == 3


def test_accelerate_resumes_to_the_bit(tmp_path):
    """save_state after three of six steps, load_state into other weights: decisions, drift and counters go on."""
    measured = Step(MEASURE)
    start(measured).train(tensors(12))

    whole = binding(measured)
    uninterrupted = start(whole)
    uninterrupted.train(tensors(12))
    assert whole.acts_on(measured)

    first = start(Step(whole.budget))
    first.train(tensors(12)[:6])
    first.accelerator.save_state(str(tmp_path))
    second = Step(whole.budget)
    resumed = start(second, seed=1)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(tensors(12)[6:])
    assert second.records == whole.records[3:]
    assert ending(resumed.model, resumed.optimizer) == ending(uninterrupted.model, uninterrupted.optimizer)
    assert first.losses + resumed.losses == uninterrupted.losses
    assert counters(resumed.optimizer) == counters(uninterrupted.optimizer)


def test_accelerate_switches_schedule_free_optimizers_through_step():
    """train() and eval() arrive at the inner optimizer: evaluation sees the averaged weights, as with the bare one."""

    def schedule_free(parameters: Any) -> torch.optim.Optimizer:
        return schedulefree.AdamWScheduleFree(parameters, lr=3e-2)

    def train(step: Step | None) -> tuple[Run, list[float]]:
        run, evaluations = start(step, accumulation=1, make=schedule_free), []
        for batch in tensors(4):
            run.optimizer.train()
            run.train([batch])
            for switch in (run.optimizer.train, run.optimizer.eval):
                switch()
                with torch.no_grad():
                    evaluations.append(run.model.eval()(**batch).loss.item())
            run.model.train()
        return run, evaluations

    measured = Step(MEASURE)
    (bare, bare_evaluations), (wrapped, evaluations) = train(None), train(measured)
    assert evaluations == bare_evaluations
    assert all(a != b for a, b in zip(evaluations[2::2], evaluations[3::2], strict=True))  # the modes differ
    assert wrapped.ending() == bare.ending()
    gate = binding(measured, Gate())
    train(gate)
    assert gate.acts_on(measured)


# Trainer, SFTTrainer, GRPOTrainer

LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])


def quiet(config: type[Any], folder: Path, **options: Any) -> Any:
    """Six steps on the CPU that log everything to nobody and save a checkpoint after the third."""
    defaults = {
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return config(str(folder), **(defaults | options))


def plain(folder: Path, model: Any = None, optimizers: Any = (None, None), **options: Any) -> transformers.Trainer:
    """The Trainer, with two batches accumulated in each step."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2} | options
    return transformers.Trainer(
        model or policy(),
        quiet(transformers.TrainingArguments, folder, **options),
        train_dataset=texts(),
        eval_dataset=texts(2),
        optimizers=optimizers,
    )


def sft(folder: Path, model: Any = None, optimizers: Any = (None, None), **options: Any) -> trl.SFTTrainer:
    """TRL's supervised trainer with LoRA."""
    tokenizer = byte_tokenizer()
    return trl.SFTTrainer(
        model or policy(vocab=len(tokenizer)),
        quiet(trl.SFTConfig, folder, **options),
        train_dataset=Dataset.from_dict({"text": ["one fish", "two fish", "red fish", "blue fish"] * 4}),
        processing_class=tokenizer,
        peft_config=None if hasattr(model, "peft_config") else LORA,
        optimizers=optimizers,
    )


def grpo(folder: Path, model: Any = None, optimizers: Any = (None, None), **options: Any) -> trl.GRPOTrainer:
    """TRL's GRPO with LoRA, rewarded for letters."""
    tokenizer = byte_tokenizer()

    def letters(completions: list[str], **_: Any) -> list[float]:
        return [sum(character.isalpha() for character in text) / 8 for text in completions]

    return trl.GRPOTrainer(
        model or policy(vocab=len(tokenizer)),
        letters,
        quiet(trl.GRPOConfig, folder, num_generations=2, max_completion_length=8, **options),
        train_dataset=Dataset.from_dict({"prompt": ["one", "two", "red", "blue"] * 4}),
        processing_class=tokenizer,
        peft_config=None if hasattr(model, "peft_config") else LORA,
        optimizers=optimizers,
    )


HOSTS = {"Trainer": plain, "SFTTrainer": sft, "GRPOTrainer": grpo}


def own_optimizers(folder: Path, build: Callable[..., Any], step: Step | None, **options: Any) -> Any:
    """`optimizers=(optimizer, scheduler)`: the model has all its parameters before the trainer exists."""
    model = policy(vocab=VOCAB if build is plain else len(byte_tokenizer()))
    if build is not plain:
        model = get_peft_model(model, LORA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    optimizer = optimizer if step is None else step.around(optimizer, model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return build(folder, model, (optimizer, scheduler), **options)


def after_create_optimizer(folder: Path, build: Callable[..., Any], step: Step | None, **options: Any) -> Any:
    """The trainer makes its optimizer, and for LoRA the parameters too; then STEP goes around it."""
    trainer = build(folder, **options)
    if step is not None:
        trainer.create_optimizer()
        trainer.optimizer = step.around(trainer.optimizer, trainer.model)
    return trainer


WAYS = [own_optimizers, after_create_optimizer]


def make(folder: Path, build: Callable[..., Any], way: Callable[..., Any], step: Step | None, **options: Any) -> Any:
    forget_accelerator()
    transformers.set_seed(3)
    return way(folder, build, step, **options)


def trained(trainer: Any, resume: Path | None = None) -> dict[str, Any]:
    """Train, and take all bits and logged figures."""
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    log = [
        {name: repr(value) for name, value in entry.items() if not any(part in name for part in NOT_OF_THE_RUN)}
        for entry in trainer.state.log_history
    ]
    return ending(trainer.model, trainer.optimizer) | {"log": log}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_trainer_is_bit_identical_resumes_to_the_bit_and_holds_budgets(host, way, tmp_path):
    """Bare and measured runs agree, a finite budget holds, and a run resumed from its checkpoint is that same run."""
    build, measured = HOSTS[host], Step(MEASURE)
    bare = trained(make(tmp_path / "bare", build, way, None))
    assert trained(make(tmp_path / "measured", build, way, measured)) == bare

    whole = binding(measured)
    uninterrupted = make(tmp_path / "whole", build, way, whole)
    expected = trained(uninterrupted)
    assert whole.acts_on(measured)
    assert any(record["action"] == "shrink" for record in whole.records)

    second = Step(whole.budget)
    resumed = make(tmp_path / "resumed", build, way, second)
    assert trained(resumed, resume=tmp_path / "whole" / "checkpoint-3") == expected
    assert second.records == whole.records[3:]
    assert counters(resumed.optimizer) == counters(uninterrupted.optimizer)


@pytest.mark.parametrize("host", ["SFTTrainer", "GRPOTrainer"])
def test_trl_with_its_own_precision_is_bit_identical_and_holds_budgets(host, tmp_path):
    """TRL's defaults are autocast to bf16 and gradient checkpointing."""
    options = {"bf16": True, "gradient_checkpointing": True, "max_steps": 3, "save_strategy": "no"}
    measured = Step(MEASURE)
    bare = trained(make(tmp_path, HOSTS[host], after_create_optimizer, None, **options))
    assert trained(make(tmp_path, HOSTS[host], after_create_optimizer, measured, **options)) == bare
    held = binding(measured)
    trained(make(tmp_path, HOSTS[host], after_create_optimizer, held, **options))
    assert held.acts_on(measured)


@pytest.mark.parametrize("host", HOSTS)
def test_a_trainer_whose_every_step_is_rejected_trains_nothing(host, tmp_path):
    """Weights and optimizer state stay as they were; steps and the schedule go on."""
    gate = Step(Budget(mean=0.0), Gate())
    trainer = make(tmp_path, HOSTS[host], after_create_optimizer, gate, max_steps=3, save_strategy="no")
    before = [bits(p) for p in trainer.model.parameters()]
    trainer.train()
    assert [record["action"] for record in gate.records] == ["reject"] * 3
    assert [bits(p) for p in trainer.model.parameters()] == before
    assert not innermost(trainer.optimizer).state
    assert trainer.state.global_step == 3
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0


def test_checkpoints_of_bare_and_wrapped_trainers_are_interchangeable(tmp_path):
    """Either resumes the other's, and ends in the same bits; there is nothing to convert."""
    bare = trained(make(tmp_path / "bare", plain, after_create_optimizer, None))
    trained(make(tmp_path / "step", plain, after_create_optimizer, Step(MEASURE)))
    for saved, step in (("bare", Step(MEASURE)), ("step", None)):
        resumed = make(tmp_path / "resumed", plain, after_create_optimizer, step)
        assert trained(resumed, resume=tmp_path / saved / "checkpoint-3") == bare


def test_trainer_switches_schedule_free_optimizers_through_step(tmp_path):
    """optim="schedule_free_adamw" is evaluated every step with the averaged weights, as with the bare one."""
    options = {
        "optim": "schedule_free_adamw",
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 4,
        "save_strategy": "no",
    }
    measured = Step(MEASURE)
    bare = trained(make(tmp_path, plain, after_create_optimizer, None, **options))
    assert trained(make(tmp_path, plain, after_create_optimizer, measured, **options)) == bare
    assert sum("eval_loss" in entry for entry in bare["log"]) == 4
    gate = binding(measured, Gate())
    trained(make(tmp_path, plain, after_create_optimizer, gate, **options))
    assert gate.acts_on(measured)


@pytest.mark.parametrize("build", [sft, grpo])
def test_an_optimizer_made_before_trl_adds_the_lora_trains_nothing_and_the_record_says_so(build, tmp_path):
    """With peft_config= the parameters that `optimizers=` was given are frozen: every step is `unchanged`."""
    transformers.set_seed(3)
    step = Step(MEASURE)
    model = policy(vocab=len(byte_tokenizer()))
    optimizer = step.around(torch.optim.AdamW(model.parameters(), lr=2e-2), model)
    trainer = build(tmp_path, model, (optimizer, None), max_steps=2, save_strategy="no")
    trainer.train()
    assert [record["action"] for record in step.records] == ["unchanged", "unchanged"]
    assert not any(p.any() for name, p in trainer.model.named_parameters() if "lora_B" in name)
