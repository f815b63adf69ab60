"""What the hosts of language models share: a tiny policy, texts, STEP with `TokenKL`, and the trainers' small print."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch.optim import Optimizer

from step_optim import Action, Budget, STEPOptimizer, StepRecord, TokenKL
from tests.hosts.common import Loop, Stepped, bare, check_host, check_record, differing, everything
from tests.models import VOCAB, ragged_control, tiny_llama

NOT_OF_THE_RUN = ("runtime", "per_second", "step_time", "train_loss", "num_tokens")
"""Logged figures that are times, or that a trainer counts from zero after a resume."""

Build = Callable[..., Any]
"""Makes a trainer from a folder, a model and ``optimizers=``."""


class SteppedText(Stepped):
    """STEP with `TokenKL`; the observer reads a copy of the model that no host has a hand in."""

    def __call__(self, optimizer: Optimizer, model: Any, **_: Any) -> STEPOptimizer:
        """Wrap the optimizer of a language model."""
        twin = copy.deepcopy(model)
        for module in twin.modules():
            vars(module).pop("forward", None)  # what a host has patched still belongs to the original
        observer = TokenKL(twin, ragged_control())

        def synchronised() -> TokenKL:
            twin.load_state_dict(model.state_dict())
            return observer

        def after(plain: dict[str, Any], _: int) -> None:
            record = StepRecord.from_dict(plain)
            check_record(record, synchronised())
            self.records.append(record)

        wrapped = STEPOptimizer(
            optimizer,
            kl=TokenKL(model, ragged_control()),
            budget=self.budget,
            controller=self.controller(),
            log=after,
        )
        wrapped.register_step_pre_hook(lambda *_: synchronised().anchor())
        self.optimizers.append(wrapped)
        return wrapped

    def story(self) -> list[dict[str, Any]]:
        """All records, but for times."""
        return [record.to_dict() | {"seconds": None} for record in self.records]


def check_text_host(loop: Loop) -> tuple[Stepped, Stepped, Stepped]:
    """`check_host` for language models: the loop calls ``wrap(optimizer, model)``."""
    return check_host(loop, SteppedText)


def forget_accelerator() -> None:
    """Forget the state that accelerate shares between all its objects."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


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


def innermost(optimizer: Any) -> Any:
    """The torch optimizer inside of accelerate's wrapper and ours."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def counters(optimizer: Any) -> dict[str, Any]:
    """What `summary` says about the whole run, but for times."""
    while not isinstance(optimizer, STEPOptimizer):
        optimizer = optimizer.optimizer
    return {name: value for name, value in optimizer.summary().items() if not name.endswith(("_seconds", "_share"))}


# -- trainers --------------------------------------------------------------------------------------------------------


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


def own_optimizers(build: Build, wrap: Any, folder: Path, model: Any, **options: Any) -> Any:
    """`optimizers=(optimizer, scheduler)`: the model has all its parameters before the trainer exists."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = wrap(torch.optim.AdamW(trained, lr=2e-2), model)
    return build(folder, model, (optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)), **options)


def after_create_optimizer(build: Build, wrap: Any, folder: Path, model: Any = None, **options: Any) -> Any:
    """The trainer makes its optimizer, and for LoRA the parameters too; then STEP goes around it."""
    trainer = build(folder, model, **options)
    if wrap is not bare:
        trainer.create_optimizer()
        trainer.optimizer = wrap(trainer.optimizer, trainer.model)
    return trainer


def trained(trainer: Any, resume: Path | None = None) -> dict[str, Any]:
    """Train, and take all bits and logged figures."""
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    log = [
        {name: repr(value) for name, value in sorted(entry.items()) if not any(part in name for part in NOT_OF_THE_RUN)}
        for entry in trainer.state.log_history
    ]
    return everything(trainer.model, innermost(trainer.optimizer), log=log, step=trainer.state.global_step)


def seeded(make: Callable[[], Any], seed: int = 3) -> Any:
    """Make a host from the same random streams as every other time."""
    forget_accelerator()
    transformers.set_seed(seed)
    return make()


def check_resume(make: Callable[[Any, Path], Any], folder: Path) -> None:
    """A run resumed from the checkpoint of its third step goes on as the uninterrupted one that saved it."""
    measured = SteppedText(math.inf)
    trained(make(measured, folder / "measured"))
    budget = Budget(mean=measured.records[0].candidate.mean / 4)

    whole, second = SteppedText(budget), SteppedText(budget)
    uninterrupted = make(whole, folder / "whole")
    expected = trained(uninterrupted)
    assert Action.SHRINK in whole.actions()
    resumed = make(second, folder / "resumed")
    assert differing(trained(resumed, resume=folder / "whole" / "checkpoint-3"), expected) == []
    assert second.story() == whole.story()[3:]
    assert counters(resumed.optimizer) == counters(uninterrupted.optimizer)
