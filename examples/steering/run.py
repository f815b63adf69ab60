"""One run: a task is learned for some steps, one way, at one learning rate."""

from __future__ import annotations

import random
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from finished import once

from steering.arms import arm_of
from steering.world import Lesson, Sets, World, exact, loss
from step_optim import STEPOptimizer, TokenKL


@dataclass(frozen=True)
class Setting:
    """What tells one run from another."""

    task: str
    arm: str
    lr: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.task}-{self.arm}-{self.lr:g}-{self.seed}-{self.steps}"


@dataclass(frozen=True)
class Result:
    """What a run ended with; drift in nats per token from the model before training."""

    nll: float
    """Of the test responses, per token."""
    exact: float
    """Share of the test responses that are the likeliest, token by token."""
    drift: float
    """On the control set."""
    largest: float
    """The largest of any step."""
    held_out: float
    """On the held-out prompts."""
    shared: float
    """Mean over those of their slices that the control set has, too."""
    worst: float
    """The worst held-out slice."""
    rejected: int
    at_cap: int
    """Steps that were over the cap as they were proposed."""
    corrections: float
    """Gradients over a draw as large as the control set, per step."""
    audits: float
    """Per step."""
    progress: float
    """Mean share of the first-order decrease that was kept."""
    seconds: float


def run(setting: Setting, world: World, folder: Path) -> Result:
    """Do one run, or read what it ended with if it was done before."""

    def do() -> Result:
        with world.lesson(setting.task, setting.seed) as lesson, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing pool, and of stalls: arms show them
            return _learn(setting, lesson, world.sets)

    return once(setting, folder, Result, do)


def _learn(setting: Setting, lesson: Lesson, sets: Sets) -> Result:
    arm, model = arm_of(setting.arm), lesson.model
    pool = sets.pool.select(range(min(arm.pool, len(sets.pool)))) if arm.pool else None
    kl = TokenKL(model, sets.control, pool=pool, noise_floor=False)
    held_out = TokenKL(model, sets.held_out, noise_floor=False)
    held_out.anchor()
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(trained, lr=setting.lr, weight_decay=0.0)
    optimizer = STEPOptimizer(inner, kl=kl, budget=arm.budget, controller=arm.controller)
    start, largest, rng = time.monotonic(), 0.0, random.Random(setting.seed)
    for _ in range(setting.steps):
        model.train()
        total = loss(model, lesson.draw(rng))
        if arm.beta:
            total = total + arm.beta * kl.penalty(4)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        largest = max(largest, optimizer.last.reference_drift.mean)
    seconds = time.monotonic() - start
    model.eval()
    with torch.no_grad():
        nll = float(loss(model, lesson.test))
    elsewhere, summary = held_out(), optimizer.summary()
    return Result(
        nll=nll,
        exact=exact(model, lesson.test),
        drift=optimizer.last.reference_drift.mean,
        largest=largest,
        held_out=elsewhere.mean,
        shared=fmean(kl for name, kl in elsewhere.slices.items() if name in sets.control.slices),
        worst=elsewhere.worst[1],
        rejected=summary["rejects"],
        at_cap=round(summary["trigger_rate"] * setting.steps),
        corrections=summary["corrections_per_step"],
        audits=summary["audits_per_step"],
        progress=summary["mean_progress"],
        seconds=seconds,
    )
