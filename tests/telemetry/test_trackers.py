"""Experiment trackers: whatever they take, every record reaches them, flat, and none is lost."""

from __future__ import annotations

import csv
import json
import math
import types
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import nn

from step_optim import STEPOptimizer, read_log

STEPS = 4


def train(log: Any, between: Any = lambda: None) -> STEPOptimizer:
    """A few committed steps; ``between`` runs after each."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=0.1), kl=lambda: 0.0, budget=1.0, log=log)
    for _ in range(STEPS):
        weight.grad = torch.ones(1)
        optimizer.step()
        between()
    return optimizer


class Run:
    """Counts its own steps as W&B does: a call without a step ends one, and what comes with a smaller one is lost."""

    def __init__(self) -> None:
        self.step, self.rows, self.metrics = 0, {}, []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        if step is None:
            self.rows.setdefault(self.step, {}).update(data)
            self.step += 1
        elif step >= self.step:
            self.step = step
            self.rows.setdefault(step, {}).update(data)

    @property
    def records(self) -> list[int]:
        return [row["step_optim/step"] for row in self.rows.values() if "step_optim/step" in row]


@pytest.mark.parametrize("how", ["run", "run.log", "module", "module.log"])
@pytest.mark.parametrize("others", [0, 1, 3])
def test_a_run_that_counts_its_own_steps_keeps_every_record(how, others) -> None:
    """However often others log without a step, all records are there, in order, over their own step."""
    run = Run()
    module = types.ModuleType("tracker")
    module.run, module.log, module.define_metric = run, run.log, run.define_metric
    log = {"run": run, "run.log": run.log, "module": module, "module.log": module.log}[how]
    train(log, lambda: [run.log({"loss": 1.0}) for _ in range(others)])
    assert run.records == list(range(STEPS))
    assert sum("loss" in row for row in run.rows.values()) == others * STEPS
    assert run.metrics == [("step_optim/*", "step_optim/step")]


def test_two_optimizers_share_a_run() -> None:
    """Records of both are kept: neither is written over by the other's."""
    run = Run()
    optimizers = [train(run) for _ in range(2)]
    for optimizer in optimizers * 3:
        optimizer.step()
    assert sorted(run.records) == sorted([*range(STEPS + 3)] * 2)


def test_the_real_one(tmp_path) -> None:
    """The same with W&B itself, offline."""
    wandb = pytest.importorskip("wandb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = wandb.init(
            project="test", dir=tmp_path, mode="offline", settings=wandb.Settings(silent=True, console="off")
        )
        train(run, lambda: [run.log({"loss": 1.0}) for _ in range(3)])
        assert run.summary["step_optim/step"] == STEPS - 1
        run.finish()


class Counted(accelerate.tracking.GeneralTracker):
    """A tracker of accelerate's that keeps what it is given."""

    requires_logging_directory = False

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.run, self.given = name, run, []
        super().__init__()

    @property
    def tracker(self) -> Run:
        return self.run

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """There is nothing to store."""

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.given.append((step, values["step_optim/step"]))
        self.run.log(values, step)


@pytest.mark.parametrize("bound", [False, True])
def test_accelerate_gives_a_step_to_the_trackers_that_bear_one(bound) -> None:
    """Its W&B tracker is logged to by W&B's rule, and others get the step of the record."""
    accelerator = accelerate.Accelerator(cpu=True)
    mine, theirs = Counted("wandb", Run()), Counted("board", Run())
    accelerator.trackers = [mine, theirs]
    train(accelerator.log if bound else accelerator, lambda: mine.run.log({"loss": 1.0}))
    assert mine.run.records == list(range(STEPS))
    assert theirs.given == [(step, step) for step in range(STEPS)]


def test_an_accelerator_without_trackers_is_told() -> None:
    """Records that go nowhere are not lost without a word."""
    with pytest.warns(UserWarning, match="log=accelerator has no trackers"):
        train(accelerate.Accelerator(cpu=True))


@pytest.mark.parametrize("bound", [False, True])
def test_a_trainer_takes_no_step(tmp_path, bound) -> None:
    """`Trainer.log(logs, start_time)` gets flat records, and no step for a start time."""
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(model=nn.Linear(1, 1), args=arguments)
    train(trainer.log if bound else trainer)
    history = [row for row in trainer.state.log_history if "step_optim/step" in row]
    assert [row["step_optim/step"] for row in history] == list(range(STEPS))
    assert not any(isinstance(value, (dict, list)) for row in history for value in row.values())
    assert not any("runtime" in name for row in history for name in row)


def test_a_lightning_logger_gets_numbers(tmp_path) -> None:
    """A logger of metrics bears no texts; its file has one row a step."""
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    train(logger, logger.save)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(float(row["step_optim/step"])) for row in rows] == list(range(STEPS))
    assert all(float(row["step_optim/triggered"]) == 0 for row in rows)


class NeedsMore:
    """Its log() cannot be called with a record."""

    def log(self, name: str, value: float) -> None:
        """One figure at a time."""


@pytest.mark.parametrize("log", [NeedsMore(), lambda: None, lambda a, b, c: None])
def test_what_cannot_take_a_record_is_refused_at_construction(log) -> None:
    """Not in step 1."""
    with pytest.raises(TypeError, match="log="):
        train(log)


def test_functions_get_the_whole_record() -> None:
    """A callable(dict, step) is given the nested record; one that takes no step gets none."""
    pairs, alone = [], []
    train(lambda record, step: pairs.append((record["step"], step, record["candidate"]["mean"])))
    train(lambda record: alone.append(record["step"]))
    assert pairs == [(step, step, 0.0) for step in range(STEPS)]
    assert alone == list(range(STEPS))


def test_a_home_directory_in_a_path_is_that_of_the_user(tmp_path, monkeypatch) -> None:
    """``~`` is no folder of that name: in log=, and for whoever reads the log."""
    monkeypatch.setenv("HOME", str(tmp_path))
    train("~/runs/step.jsonl")
    assert [record.step for record in read_log("~/runs/step.jsonl")] == list(range(STEPS))
    first = json.loads((tmp_path / "runs" / "step.jsonl").read_text().splitlines()[1])
    assert math.isfinite(first["candidate"]["mean"])
