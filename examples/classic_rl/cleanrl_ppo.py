"""PPO in one file, in the style of cleanrl, for discrete and Box actions; the lines that STEP adds end in ``# STEP``.

    python examples/classic_rl/cleanrl_ppo.py
    python examples/classic_rl/cleanrl_ppo.py --env-id Pendulum-v1 --budget 0.02 --learning-rate 1e-3

Shapes: T steps of E environments in one rollout, D numbers in an observation.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from step_optim import PolicyKL, STEPOptimizer  # STEP


@dataclass
class Args:
    """What a run is made of."""

    env_id: str = "CartPole-v1"
    """a Gymnasium task with a vector as observation"""
    budget: float = 0.02
    """largest movement of one update [nats per action]; inf only measures"""
    total_steps: int = 50_000
    """environment steps"""
    learning_rate: float = 3e-3
    """of Adam; ten times the usual one, since the budget limits what it does"""
    num_envs: int = 4
    """environments side by side"""
    num_steps: int = 128
    """steps of each in one rollout"""
    epochs: int = 4
    """passes over a rollout"""
    minibatches: int = 4
    """of one pass"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """of the advantage estimate"""
    clip: float = 0.2
    """of the probability ratio"""
    entropy: float = 0.01
    """weight of the entropy bonus"""
    seed: int = 0
    """of everything that is random"""


def mlp(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers of 64."""
    net = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
    nn.init.orthogonal_(net[-1].weight, gain)
    return net


class Agent(nn.Module):
    """Actor and critic."""

    def __init__(self, envs: gym.vector.VectorEnv) -> None:
        super().__init__()
        size, space = math.prod(envs.single_observation_space.shape), envs.single_action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        actions = int(space.n) if self.discrete else math.prod(space.shape)
        self.actor, self.critic = mlp(size, actions, 0.01), mlp(size, 1, 1.0)
        self.log_std = nn.Parameter(torch.zeros(actions))

    def policy(self, x: Tensor) -> Distribution:
        """Observations [N, D] -> N distributions."""
        out = self.actor(x)
        return Categorical(logits=out) if self.discrete else Independent(Normal(out, self.log_std.exp()), 1)


def main(args: Args) -> STEPOptimizer:
    """Train, and print one line for each update."""
    torch.manual_seed(args.seed)
    envs = gym.vector.SyncVectorEnv(
        [lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(args.env_id))] * args.num_envs,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )
    agent = Agent(envs)
    inner = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)

    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(*shape, math.prod(envs.single_observation_space.shape))
    rewards, dones, values, logprobs = (torch.zeros(shape) for _ in range(4))
    actions = torch.zeros(shape, dtype=torch.long) if agent.discrete else torch.zeros(*shape, len(agent.log_std))
    next_obs, next_done = torch.as_tensor(envs.reset(seed=args.seed)[0]).float(), torch.zeros(args.num_envs)
    kl = PolicyKL(agent.policy, observations=next_obs, model=agent)  # STEP
    optimizer = STEPOptimizer(inner, kl, budget=args.budget)  # STEP
    episodes: list[float] = []

    for update in range(args.total_steps // (args.num_steps * args.num_envs)):
        for t in range(args.num_steps):
            obs[t], dones[t] = next_obs, next_done
            with torch.no_grad():
                policy = agent.policy(next_obs)
                actions[t] = policy.sample()
                logprobs[t], values[t] = policy.log_prob(actions[t]), agent.critic(next_obs).squeeze(-1)
            taken = actions[t].numpy()
            taken = taken if agent.discrete else taken.clip(envs.action_space.low, envs.action_space.high)
            found, reward, terminated, truncated, infos = envs.step(taken)
            rewards[t] = torch.as_tensor(reward)
            next_obs, next_done = torch.as_tensor(found).float(), torch.as_tensor(terminated | truncated).float()
            if "episode" in infos.get("final_info", {}):
                ended = infos["final_info"]["_episode"]
                episodes += infos["final_info"]["episode"]["r"][ended].tolist()

        advantages, ahead = torch.zeros(shape), torch.zeros(args.num_envs)
        with torch.no_grad():
            following, open_ = agent.critic(next_obs).squeeze(-1), 1 - next_done
        for t in reversed(range(args.num_steps)):
            delta = rewards[t] + args.gamma * following * open_ - values[t]
            advantages[t] = ahead = delta + args.gamma * args.gae_lambda * open_ * ahead
            following, open_ = values[t], 1 - dones[t]

        b_obs, b_actions = obs.flatten(0, 1), actions.flatten(0, 1)
        b_logprobs, b_advantages, b_returns = (x.flatten() for x in (logprobs, advantages, advantages + values))
        kl.observe(b_obs)  # STEP
        with optimizer.window():  # STEP
            for _ in range(args.epochs):
                for rows in torch.randperm(len(b_obs)).chunk(args.minibatches):
                    policy = agent.policy(b_obs[rows])
                    ratio = (policy.log_prob(b_actions[rows]) - b_logprobs[rows]).exp()
                    gain = b_advantages[rows]
                    gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - args.clip, 1 + args.clip) * gain).mean()
                    value_loss = (agent.critic(b_obs[rows]).squeeze(-1) - b_returns[rows]).square().mean()
                    loss = 0.5 * value_loss - surrogate - args.entropy * policy.entropy().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                    optimizer.step()
        last = optimizer.last
        mean = float(np.mean(episodes[-20:])) if episodes else math.nan
        print(f"update {update:3}  return {mean:8.1f}  {last.action}  KL {last.candidate.mean:.4f}", end="")
        print(f" -> {0.0 if last.accepted is None else last.accepted.mean:.4f}")
    envs.close()
    return optimizer


def parsed() -> Args:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Args):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return Args(**vars(parser.parse_args()))


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks as small as these are faster on one
    main(parsed())
