"""A Lightning module whose training can be compared bit for bit, wrapped and bare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from tests.hosts.common import everything
from tests.strategies import Policy

OBSERVATIONS = torch.linspace(-1, 1, 30).reshape(6, 5)
Wrap = Callable[..., Optimizer]


def data(step: int) -> tuple[Tensor, Tensor]:
    """Observations [8, 5] and actions [8], a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def loader(shuffle: bool = True) -> DataLoader:
    """Five batches; shuffled with the global random stream."""
    x, y = zip(*(data(step) for step in range(5)), strict=True)
    return DataLoader(TensorDataset(torch.cat(x), torch.cat(y)), batch_size=8, shuffle=shuffle)


def trainer_for(epochs: int = 2, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, enable_model_summary=False, **quiet | options)


class Module(pl.LightningModule):
    """A policy with dropout and BatchNorm under automatic optimisation; subclasses change what they are about."""

    rate = 0.02

    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.policy = Policy()
        self.wrap = wrap
        self.losses: list[float] = []
        self.seen: list[Any] = []

    def loss(self, batch: tuple[Tensor, Tensor], policy: nn.Module | None = None) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy((policy or self.policy)(x).float(), y)
        self.losses.append(float(loss.detach()))
        return loss

    def training_step(self, batch: Any, index: int) -> Any:
        return self.loss(batch)

    def inner(self) -> Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=self.rate)

    def configure_optimizers(self) -> Any:
        return self.wrap(self.inner(), lambda: self.policy(OBSERVATIONS))


def result(module: Module, trainer: Any) -> dict[str, Any]:
    assert trainer.state.finished
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return everything(
        module,
        trainer.optimizers,
        losses=module.losses,
        seen=module.seen,
        steps=trainer.global_step,
        schedules=[{k: v for k, v in state.items() if not callable(v)} for state in schedules],
    )


def fitting(build: Callable[[Wrap], Module], **options: Any) -> Callable[[Wrap], dict[str, Any]]:
    """Make the training loop that fits a module."""

    def loop(wrap: Wrap) -> dict[str, Any]:
        module = build(wrap)
        trainer = trainer_for(**options)
        trainer.fit(module, loader())
        return result(module, trainer)

    return loop
