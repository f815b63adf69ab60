"""Tiny environments and models of stable-baselines3, and an observer of updates that shares nothing with audits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common import policies as sb3_policies
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn
from torch.distributions import Categorical, kl_divergence

FLAT = spaces.Box(-1.0, 1.0, (3,))
DISCRETE, BOX = spaces.Discrete(3), spaces.Box(-1.0, 1.0, (2,))


class Toy(gym.Env):
    """Random observations of a space; the reward is for small or early actions; an episode takes seven steps."""

    def __init__(self, observed: spaces.Space[Any], acting: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = copy.deepcopy(observed), copy.deepcopy(acting)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        reward = 1.0 - float(np.abs(np.asarray(action, dtype=float)).mean())
        return self.observation_space.sample(), reward, self._steps == 7, False, {}

    def action_masks(self) -> Any:
        """The last choice of each factor is there in every other step only."""
        space = self.action_space
        sizes = [int(space.n)] if isinstance(space, spaces.Discrete) else list(getattr(space, "nvec", [2] * 2))
        masks = [np.ones(size, dtype=bool) for size in sizes]
        for mask in masks:
            mask[-1] = self._steps % 2 == 0
        return np.concatenate(masks)


class Noisy(BaseFeaturesExtractor):
    """Features with BatchNorm and dropout."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 6)
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


NET = {"net_arch": [8]}
FAST = {"n_steps": 16, "batch_size": 16, "n_epochs": 2}


@dataclass(frozen=True)
class Case:
    """How a model is made."""

    algorithm: Any = PPO
    policy: str = "MlpPolicy"
    observed: Any = None
    acting: Any = None
    kwargs: Any = None
    options: Any = None
    """Of the algorithm."""
    normalized: bool = False
    envs: int = 2

    def env(self) -> Any:
        vectorised = DummyVecEnv([lambda: Toy(self.observed or FLAT, self.acting or DISCRETE)] * self.envs)
        return VecNormalize(vectorised) if self.normalized else vectorised

    def model(self, **more: Any) -> Any:
        """A model of a large learning rate; equal ones from call to call."""
        fast = {"n_steps": 8} if self.algorithm is A2C else FAST
        kwargs = {"policy_kwargs": NET | (self.kwargs or {})}
        defaults = {"seed": 0, "device": "cpu", "learning_rate": 2e-2}
        return self.algorithm(self.policy, self.env(), **(fast | kwargs | defaults | (self.options or {}) | more))


PICTURES = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)
LSTM = {"lstm_hidden_size": 8}
FEATURES = {"features_extractor_kwargs": {"features_dim": 8}}
CASES = {
    "ppo, discrete": Case(),
    "ppo, box": Case(acting=BOX),
    "ppo, multi-discrete": Case(acting=spaces.MultiDiscrete([2, 4])),
    "ppo, multi-binary": Case(acting=spaces.MultiBinary(2)),
    "ppo, gsde": Case(acting=BOX, options={"use_sde": True, "sde_sample_freq": 3}),
    "ppo, squashed gsde": Case(acting=BOX, kwargs={"squash_output": True}, options={"use_sde": True}),
    "ppo, dict": Case(policy="MultiInputPolicy", observed=spaces.Dict({"a": FLAT, "b": spaces.Discrete(3)})),
    "ppo, pictures": Case(
        policy="CnnPolicy", observed=PICTURES, kwargs={"features_extractor_kwargs": {"features_dim": 8}}
    ),
    "ppo, discrete observations": Case(observed=spaces.Discrete(5)),
    "ppo, normalized": Case(normalized=True),
    "ppo, noisy features": Case(kwargs={"features_extractor_class": Noisy}),
    "ppo, two extractors": Case(kwargs={"share_features_extractor": False}, acting=BOX),
    "ppo, schedule": Case(options={"learning_rate": lambda left: 3e-2 * left, "clip_range": lambda left: 0.3 * left}),
    "a2c, discrete": Case(A2C),
    "a2c, box": Case(A2C, acting=BOX),
    "recurrent, discrete": Case(RecurrentPPO, "MlpLstmPolicy", kwargs=LSTM, envs=3),
    "recurrent, box": Case(RecurrentPPO, "MlpLstmPolicy", acting=BOX, kwargs=LSTM | {"n_lstm_layers": 2}),
    "recurrent, dict": Case(
        RecurrentPPO, "MultiInputLstmPolicy", observed=spaces.Dict({"a": FLAT, "b": FLAT}), kwargs=LSTM
    ),
    "maskable, discrete": Case(MaskablePPO),
    "maskable, multi-discrete": Case(MaskablePPO, acting=spaces.MultiDiscrete([3, 2])),
    "maskable, multi-binary": Case(MaskablePPO, acting=spaces.MultiBinary(2)),
    "maskable, dict": Case(MaskablePPO, "MultiInputPolicy", observed=spaces.Dict({"a": FLAT})),
}


# -- the observer ----------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One update, seen from outside: the policy before and after it in float64, on the whole rollout."""

    before: Any
    after: Any
    rollout: dict[str, Any]

    @property
    def kl(self) -> float:
        """Mean over all observations of KL(after ‖ before)."""
        return self.kl_from(self.before)

    def kl_from(self, policy: Any, *, before: bool = False) -> float:
        """Mean of KL(after ‖ policy), or of KL(before ‖ policy)."""
        now = self.before if before else self.after
        pairs = zip(_parts(now, self.rollout), _parts(policy, self.rollout), strict=True)
        each = [kl_divergence(new, old) for new, old in pairs]
        return float(sum(kl if kl.dim() == 1 else kl.sum(-1) for kl in each).mean())


def frozen(policy: Any) -> Any:
    """A float64 eval-mode copy, without the optimizer, and without what forwards left behind."""
    acting = copy.copy(policy.action_dist)
    for name, value in list(vars(acting).items()):
        if isinstance(value, torch.Tensor):
            setattr(acting, name, value.detach())
        elif name.startswith("distribution") or name == "weights_dist":
            setattr(acting, name, None)
    memo = {id(policy.action_dist): acting, id(policy.optimizer): None}
    return copy.deepcopy(policy, memo).double().eval()


@contextmanager
def observed(model: Any) -> Iterator[list[Seen]]:
    """Watch the updates of a model: around whatever its ``train`` is when it is called."""
    seen: list[Seen] = []
    collect = model.collect_rollouts

    def collecting(*args: Any, **kwargs: Any) -> Any:
        if seen and seen[-1].after is None:
            seen[-1].after = frozen(model.policy)
        went_on = collect(*args, **kwargs)
        seen.append(Seen(frozen(model.policy), None, _rollout(model)))
        return went_on

    with mock.patch.object(model, "collect_rollouts", collecting):
        yield seen
    seen[-1].after = frozen(model.policy)


def _rollout(model: Any) -> dict[str, Any]:
    """The buffer as [envs, T, ...] tensors, the recurrent states of the first step [layers, envs, hidden]."""
    buffer = model.rollout_buffer

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: turned(part) for name, part in value.items()}
        return torch.as_tensor(value).transpose(0, 1).flatten(0, 1).clone()

    found = {"obs": turned(buffer.observations), "starts": turned(buffer.episode_starts)}
    if hasattr(buffer, "action_masks"):
        found["masks"] = turned(buffer.action_masks) > 0
    if hasattr(buffer, "hidden_states_pi"):
        states = (buffer.hidden_states_pi[0], buffer.cell_states_pi[0])
        found["states"] = tuple(torch.as_tensor(state).clone().double() for state in states)
    return found


def _double(value: Any) -> Any:
    return {name: part.double() for name, part in value.items()} if isinstance(value, dict) else value.double()


def _parts(policy: Any, rollout: dict[str, Any]) -> list[Any]:
    """The torch distributions, one for each factor, in float64."""
    wide: Callable[..., Any] = lambda *args, **kwargs: _double(preprocess_obs(*args, **kwargs))  # noqa: E731
    with torch.no_grad(), mock.patch.object(sb3_policies, "preprocess_obs", wide):
        if "states" in rollout:
            found = policy.get_distribution(rollout["obs"], rollout["states"], rollout["starts"].double())[0]
        elif "masks" in rollout:
            found = policy.get_distribution(rollout["obs"], action_masks=rollout["masks"])
        else:
            found = policy.get_distribution(rollout["obs"])
    parts = getattr(found, "distributions", None) or found.distribution
    parts = parts if isinstance(parts, list) else [parts]
    return [Categorical(logits=part.logits) if isinstance(part, Categorical) else part for part in parts]
