"""One run: a policy learns a task, one way, at one learning rate."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from finished import once
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

from classic_rl.arms import ARMS, Arm
from classic_rl.tasks import TASKS, Task
from step_optim.hosts.sb3 import STEPCallback

ENVS = 8
"""Environments at once."""

ROLLOUT = 2048
"""Steps of all of them together before each update."""


@dataclass(frozen=True)
class Setting:
    """What tells one run from another."""

    task: str
    arm: str
    lr: float
    seed: int
    updates: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.task}-{self.arm}-{self.lr:g}-{self.seed}-{self.updates}"


@dataclass(frozen=True)
class Result:
    """What a run ended with."""

    returns: list[float | None]
    """Mean return of the episodes that ended in each rollout; None if none did."""
    kls: list[float]
    """KL of the policy after each update from the one before, mean over the rollout's observations [nats]."""
    seconds: float

    @property
    def curve(self) -> list[float]:
        """Returns, with the latest known one where no episode has ended; the first known one before that."""
        first = next((value for value in self.returns if value is not None), 0.0)
        curve = []
        for value in self.returns:
            first = first if value is None else value
            curve.append(first)
        return curve

    @property
    def area(self) -> float:
        """Mean of the curve."""
        return fmean(self.curve)

    @property
    def final(self) -> float:
        """Mean over the last tenth of the run, two updates at least."""
        return fmean(self.curve[-max(2, len(self.returns) // 10) :])

    @property
    def largest(self) -> float:
        """The largest KL of an update."""
        return max(self.kls)


def run(setting: Setting, folder: Path) -> Result:
    """Do one run, or read what it ended with if it was done before."""

    def do() -> Result:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stalls are in the figures
            return _learn(setting, TASKS[setting.task], ARMS[setting.arm])

    return once(setting, folder, Result, do)


def _learn(setting: Setting, task: Task, arm: Arm) -> Result:
    model = _model(setting, task, arm)
    returns, observer = Returns(), Observer()
    trusted = [] if arm.budget is None else [STEPCallback(arm.budget, controller=arm.controller, **arm.options)]
    start = time.monotonic()
    model.learn(setting.updates * ROLLOUT, callback=CallbackList([returns, *trusted, observer]))
    seconds = time.monotonic() - start - observer.seconds
    model.get_env().close()
    return Result(returns.means, observer.kls, seconds)


def _model(setting: Setting, task: Task, arm: Arm) -> Any:
    envs = make_vec_env(task.env, n_envs=ENVS, seed=setting.seed)
    options = {"learning_rate": setting.lr, "n_steps": ROLLOUT // ENVS, "seed": setting.seed, "device": "cpu"}
    if arm.trpo:
        return TRPO("MlpPolicy", envs, target_kl=arm.target_kl, **options)
    return PPO("MlpPolicy", envs, target_kl=arm.target_kl, **options)


class Observer(BaseCallback):
    """Measures each update by itself, whatever the method: KL(after ‖ before) on the whole rollout, in float64.

    It is the last of the callbacks: what it calls between two readings is the
    update with all that others have put around it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kls: list[float] = []
        self.seconds = 0.0
        """That its readings took."""

    def _on_step(self) -> bool:
        return True

    def _on_training_start(self) -> None:
        model, train = self.model, self.model.train

        def observed() -> None:
            observations = torch.tensor(model.rollout_buffer.observations).flatten(0, 1)
            before = self._read(model, observations)
            train()
            after = self._read(model, observations)
            self.kls.append(float(kl_divergence(after, before).mean()))

        model.train = observed

    @torch.no_grad()
    def _read(self, model: Any, observations: Tensor) -> Distribution:
        """The policy on the rollout's observations, in float64."""
        start = time.monotonic()
        found = model.policy.get_distribution(observations).distribution
        self.seconds += time.monotonic() - start
        if isinstance(found, Categorical):
            return Categorical(logits=found.logits.double())
        return Independent(Normal(found.loc.double(), found.scale.double()), 1)


class Returns(BaseCallback):
    """Notes the mean return of the episodes that end in each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[float | None] = []
        self._ended: list[float] = []

    def _on_step(self) -> bool:
        self._ended += [float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        self.means.append(fmean(self._ended) if self._ended else None)
        self._ended = []
