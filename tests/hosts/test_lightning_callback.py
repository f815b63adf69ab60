"""Lightning's callback: the figures are logged as the module's own are."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from step_optim import Gate, PolicyKL, STEPOptimizer, read_log, summarise
from step_optim.hosts.lightning import STEPCallback
from tests.hosts.lightning_loops import OBSERVATIONS, Module, loader, trainer_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '?.*'? does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def around(folder: Path, budget: float = 1e-3, **options: Any) -> Any:
    """Wraps the module's optimizer; the log is the oracle."""

    def wrap(inner: Any, policy: Any) -> STEPOptimizer:
        return STEPOptimizer(inner, kl=PolicyKL(policy), budget=budget, log=folder / "run.jsonl", **options)

    return wrap


def rows(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("metrics.csv")
    with file.open() as opened:
        return [row for row in csv.DictReader(opened) if row.get("step_optim/step")]


@pytest.mark.parametrize("every", [1, 2])
def test_every_logger_gets_rows_of_the_latest_steps(every, tmp_path) -> None:
    """With Lightning's own steps, as often as Lightning logs."""
    torch.manual_seed(0)
    trainer = trainer_for(
        logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1), log_every_n_steps=every, callbacks=[STEPCallback()]
    )
    trainer.fit(Module(around(tmp_path)), loader())
    records = read_log(tmp_path / "run.jsonl")
    found = rows(tmp_path)
    assert [int(float(row["step_optim/step"])) + 1 for row in found] == list(range(every, 11, every))
    for row in found:
        end = int(float(row["step_optim/step"])) + 1
        assert int(row["step"]) == end - 1
        figures = summarise(records[end - every : end])
        for name in ("mean_candidate_kl", "max_accepted_kl", "trigger_rate"):
            assert float(row[f"step_optim/{name}"]) == pytest.approx(figures[name], rel=1e-6)


def test_the_progress_bar_and_other_callbacks_have_them(tmp_path) -> None:
    """EarlyStopping can watch a rate; the progress bar shows what was asked for."""
    torch.manual_seed(0)
    stop = EarlyStopping("step_optim/rejection_rate", patience=0, mode="min", check_on_train_epoch_end=True)
    trainer = trainer_for(epochs=5, callbacks=[STEPCallback(("trigger_rate",)), stop], log_every_n_steps=1)
    trainer.fit(Module(around(tmp_path, 0.0, controller=Gate())), loader())
    assert float(trainer.callback_metrics["step_optim/rejection_rate"]) == 1.0
    assert "step_optim/trigger_rate" in trainer.progress_bar_metrics
    assert "step_optim/max_accepted_kl" not in trainer.progress_bar_metrics
    assert trainer.current_epoch == 2  # the rate did not fall after the first


def test_a_run_with_it_is_the_run_without(tmp_path) -> None:
    """It logs, and nothing else: weights and decisions are equal to the bit."""
    left = []
    for callbacks in ([], [STEPCallback()]):
        torch.manual_seed(0)
        module = Module(around(tmp_path / str(len(callbacks))))
        trainer_for(callbacks=callbacks).fit(module, loader())
        left.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*left, strict=True))


class Two(Module):
    """Two optimizers, by hand."""

    def __init__(self, wrap: Any) -> None:
        super().__init__(wrap)
        self.automatic_optimization = False
        self.other = torch.nn.Linear(5, 3)

    def training_step(self, batch: Any, index: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = self.loss(batch) + self.other(batch[0]).square().mean()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        other = STEPOptimizer(
            torch.optim.SGD(self.other.parameters(), lr=0.1),
            kl=PolicyKL(lambda: torch.distributions.Categorical(logits=self.other(OBSERVATIONS))),
            budget=1.0,
        )
        return [super().configure_optimizers(), other]


def test_two_optimizers_have_columns_of_their_own(tmp_path) -> None:
    """By their place."""
    trainer = trainer_for(epochs=1, callbacks=[STEPCallback()])
    trainer.fit(Two(around(tmp_path)), loader())
    assert trainer.callback_metrics["step_optim/step/0"] == trainer.callback_metrics["step_optim/step/1"] == 4


def test_a_module_without_step_is_refused() -> None:
    """A callback that could log nothing says so."""
    with pytest.raises(RuntimeError, match="found no STEPOptimizer"):
        trainer_for(callbacks=[STEPCallback()]).fit(Module(lambda inner, policy: inner), loader())


def test_unknown_figures_are_refused() -> None:
    """With those that there are."""
    with pytest.raises(ValueError, match="'alpha' is no figure; choose from"):
        STEPCallback(("alpha",))
    for names in ("trigger_rate", None):
        with pytest.raises(TypeError, match="is no tuple"):
            STEPCallback(names)


class Several(Module):
    """Three steps in each batch, by hand; only the first one is over budget."""

    def __init__(self, wrap: Any) -> None:
        super().__init__(wrap)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        for rate in (0.5, 1e-5, 1e-5):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def test_all_steps_of_a_batch_count(tmp_path) -> None:
    """A batch may make several, and the log has them."""
    torch.manual_seed(0)
    trainer = trainer_for(epochs=1, callbacks=[STEPCallback()], log_every_n_steps=15)
    trainer.fit(Several(around(tmp_path, 1e-4)), loader())
    records = read_log(tmp_path / "run.jsonl")
    assert len(records) == 15
    expected = summarise(records)["trigger_rate"]
    assert 0 < expected < 1
    assert float(trainer.callback_metrics["step_optim/trigger_rate"]) == pytest.approx(expected)


class Falling(Module):
    """Over budget in the first step alone."""

    def training_step(self, batch: Any, index: int) -> Any:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.5 if self.trainer.global_step == 0 else 1e-5
        return self.loss(batch)


def test_a_figure_that_is_not_measured_any_more_is_nan(tmp_path) -> None:
    """Lightning would repeat the mean alpha of steps that are long over."""
    torch.manual_seed(0)
    options = {"logger": CSVLogger(tmp_path, flush_logs_every_n_steps=1), "log_every_n_steps": 1}
    trainer = trainer_for(epochs=1, callbacks=[STEPCallback()], **options)
    trainer.fit(Falling(around(tmp_path, 1e-3)), loader())
    alphas = [float(row["step_optim/mean_alpha"]) for row in rows(tmp_path)]
    assert 0 < alphas[0] < 1
    assert all(math.isnan(alpha) for alpha in alphas[1:])


def test_it_is_a_callback_of_lightnings() -> None:
    """Of the package that is called lightning."""
    assert issubclass(STEPCallback, pl.Callback)
