"""PPO on a classic-control task, with each whole PPO update as one candidate of `STEPOptimizer`.

The policy is a function of the weights that returns a `torch.distributions.Distribution`, so `PolicyKL` can measure
it: nothing here is a language model. The learning rate is more than ten times PPO's usual 3e-4; how far an update moves
the policy is the budget's business.

    python examples/custom_rl.py                                    # CartPole-v1, well under a minute
    python examples/custom_rl.py --controller none                  # the same run, measured but not limited
    python examples/custom_rl.py --env-id Pendulum-v1 --total-steps 100000

Shapes: T steps of E environments in one rollout, N samples, D numbers in an observation, C control observations.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from step_optim import Budget, Controller, Gate, Interpolate, PolicyKL, Project, STEPOptimizer, StepRecord
from step_optim.telemetry.summary import lines

GAMMA, GAE_LAMBDA, CLIP, ENTROPY = 0.99, 0.95, 0.2, 0.005  # PPO's usual numbers
EPOCHS, MINIBATCH, CONTROL_OBSERVATIONS = 6, 256, 512

CONTROLLERS: dict[str, Callable[[], Controller]] = {
    "interpolate": Interpolate,
    "gate": lambda: Gate(patience=3),  # after 3 rejections in a row it shrinks instead, so that training goes on
    "project": Project,  # needs logits, hence discrete actions
    "none": Interpolate,  # never asked, since its budget is infinite
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    text = f"a Gymnasium task with a vector as observation, and discrete or Box actions {default}"
    add("--env-id", default="CartPole-v1", help=text)
    text = f"what happens to an update that is over budget: interpolate, gate, project; none only measures {default}"
    add("--controller", choices=list(CONTROLLERS), default="interpolate", help=text)
    text = f"largest movement of one update, mean over the control observations [nats per action] {default}"
    add("--budget-mean", type=float, default=0.01, help=text)
    text = f"largest movement of one update in any slice of them [nats per action] {default}"
    add("--budget-slices", type=float, default=0.015, help=text)
    add("--total-steps", type=int, default=40960, help=f"environment steps in all {default}")
    add("--seed", type=int, default=0, help=f"of everything that is random {default}")
    add("--log", default="", help=f"path of a JSONL log; empty for none {default}")
    add("--learning-rate", type=float, default=5e-3, help=f"of Adam {default}")
    add("--num-envs", type=int, default=8, help=f"environments that run side by side {default}")
    add("--num-steps", type=int, default=256, help=f"steps of each environment in one rollout {default}")
    return parser.parse_args()


def mlp(inputs: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Return a small network; a small last gain makes its first policy near uniform."""
    linears = nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)
    for linear, gain in zip(linears, (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(linears[0], nn.Tanh(), linears[1], nn.Tanh(), linears[2])


class Policy(nn.Module):
    """Observations [N, D] to distributions of actions: Categorical, or Normal in units of the Box's half width."""

    def __init__(self, observation_size: int, actions: gym.Space) -> None:
        super().__init__()
        self.box = actions if isinstance(actions, gym.spaces.Box) else None
        size = int(actions.n) if self.box is None else math.prod(actions.shape)
        self.net = mlp(observation_size, size, last_gain=0.01)
        self.log_std = nn.Parameter(torch.full((size,), -0.5)) if self.box else None

    def forward(self, observations: Tensor) -> Distribution:
        """Return N distributions."""
        out = self.net(observations)
        return Categorical(logits=out) if self.box is None else Independent(Normal(out, self.log_std.exp()), 1)

    def to_env(self, actions: Tensor) -> np.ndarray:
        """Return sampled actions in the environment's own units."""
        if self.box is None:
            return actions.numpy()
        middle, half = (self.box.high + self.box.low) / 2, (self.box.high - self.box.low) / 2
        return middle + half * actions.numpy().clip(-1, 1).reshape(-1, *self.box.shape)


def make_envs(args: argparse.Namespace) -> gym.vector.VectorEnv:
    """Return E environments that step together and reset themselves."""
    return gym.vector.SyncVectorEnv([lambda: gym.make(args.env_id)] * args.num_envs)


def as_tensor(array: np.ndarray) -> Tensor:
    """Return float32, whatever the environment computes in."""
    return torch.as_tensor(array, dtype=torch.float32)


def control_observations(args: argparse.Namespace) -> Tensor:
    """Return observations that a uniformly random policy met, [C, D].

    They are collected once and stay fixed. The audit that licensed one update is the reference of the next, and two
    policies can be compared only where both were read; besides, every update is then measured with the same yardstick.
    Whoever redraws them, from the current policy say, has to call `optimizer.refresh()` afterwards.
    """
    envs = make_envs(args)
    envs.action_space.seed(args.seed)
    found = [envs.reset(seed=args.seed)[0]]
    while len(found) * args.num_envs < CONTROL_OBSERVATIONS:
        found.append(envs.step(envs.action_space.sample())[0])
    envs.close()
    return as_tensor(np.concatenate(found)[:CONTROL_OBSERVATIONS])


def slices_of(observations: Tensor, env_id: str) -> dict[str, list[int]]:
    """Name the situations in which the policy must not jump; they may overlap."""
    if env_id.startswith("CartPole"):
        angle = observations[:, 2]
        edge = angle.abs() > 0.1  # about half the angle at which the episode ends
        masks = {"leaning left": angle < 0, "leaning right": angle >= 0, "near the edge": edge}
        return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items() if mask.any()}
    slices = {}  # of a task that nothing is known about: thirds of its first observed numbers
    for d in range(min(2, observations.shape[1])):
        low, middle, high = observations[:, d].argsort(stable=True).tensor_split(3)
        slices |= {f"low obs[{d}]": low.tolist(), f"middle obs[{d}]": middle.tolist(), f"high obs[{d}]": high.tolist()}
    return slices


class Rollout(NamedTuple):
    """N samples of the policy."""

    observations: Tensor  # [N, D]
    actions: Tensor  # [N], or [N, action size]
    logprobs: Tensor  # [N] of these actions, under the policy that took them
    advantages: Tensor  # [N]
    returns: Tensor  # [N] what the value network should say


class Sampler:
    """Runs the environments on from where the last rollout ended; keeps the returns of the latest 20 episodes."""

    def __init__(self, args: argparse.Namespace) -> None:
        envs = gym.wrappers.vector.RecordEpisodeStatistics(make_envs(args))
        # Rewards in units of their discounted sum's spread: one learning rate then suits every task.
        self.envs = gym.wrappers.vector.NormalizeReward(envs, GAMMA)
        self.returns: deque[float] = deque(maxlen=20)
        self.observation = as_tensor(self.envs.reset(seed=args.seed)[0])
        self.resetting = torch.zeros(args.num_envs, dtype=torch.bool)

    @torch.no_grad()
    def rollout(self, policy: Policy, critic: nn.Module, steps: int) -> Rollout:
        """Take T steps in every environment; N is less than T E, since steps that reset one are left out."""
        rows: list[tuple[Tensor, ...]] = []
        for _ in range(steps):
            distribution = policy(self.observation)
            actions = distribution.sample()
            following, rewards, terminated, truncated, infos = self.envs.step(policy.to_env(actions))
            if "episode" in infos:
                self.returns.extend(infos["episode"]["r"][infos["_episode"]].tolist())
            ended = torch.as_tensor(terminated | truncated)
            seen = self.observation, actions, distribution.log_prob(actions)
            rows.append((*seen, self.resetting, as_tensor(rewards), torch.as_tensor(terminated), ended))
            # The step after an episode's end takes no action, it resets: no sample of the policy.
            self.observation, self.resetting = as_tensor(following), ended
        observations, actions, logprobs, resetting, *outcome = (torch.stack(x) for x in zip(*rows, strict=True))
        values = critic(torch.cat([observations, self.observation[None]])).squeeze(-1)
        advantages = self.estimate(values, *outcome)
        columns = observations, actions, logprobs, advantages, advantages + values[:-1]
        return Rollout(*(column[~resetting] for column in columns))

    def estimate(self, values: Tensor, rewards: Tensor, terminated: Tensor, ended: Tensor) -> Tensor:
        """Return the generalised advantage estimate, [T, E], from values [T + 1, E]."""
        advantages, ahead = torch.empty_like(rewards), torch.zeros(values.shape[1])
        for t in reversed(range(len(rewards))):
            # A truncated episode would have gone on from its last observation, which stands before the reset.
            delta = rewards[t] + GAMMA * values[t + 1] * ~terminated[t] - values[t]
            advantages[t] = ahead = delta + GAMMA * GAE_LAMBDA * ahead * ~ended[t]
        return advantages


def loss_of(policy: Policy, critic: nn.Module, batch: Rollout) -> Tensor:
    """Return PPO's clipped loss with the value loss and the entropy bonus."""
    distribution = policy(batch.observations)
    ratio = (distribution.log_prob(batch.actions) - batch.logprobs).exp()
    advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    value_loss = (critic(batch.observations).squeeze(-1) - batch.returns).square().mean()
    return 0.5 * value_loss - gain.mean() - ENTROPY * distribution.entropy().mean()


def describe(record: StepRecord) -> str:
    """Return one line about one update."""
    reward = "      -" if record.reward is None else f"{record.reward:7.1f}"  # no episode has ended yet
    kl = f"KL candidate {record.candidate.mean:.4f} budget {record.budget.mean:g} accepted {record.accepted.mean:.4f}"
    worst = "worst slice {:13} {:.4f}".format(*record.candidate.worst)
    alpha = "" if record.alpha is None else f"alpha {record.alpha:.2f}"  # a projection is no part of the update
    return f"update {record.step:3}  return {reward}  {kl}  {worst}  {record.action:8} {alpha}".rstrip()


def report(optimizer: STEPOptimizer, args: argparse.Namespace) -> None:
    """Print the figures of the run, and the sentence that matters."""
    summary = optimizer.summary()
    print("\n" + "\n".join(lines(summary)))
    print(
        f"\nNo update moved the policy by more than {summary['max_accepted_kl']:.4f} nats on average (budget "
        f"{args.budget_mean:g}) or {summary['max_accepted_slice_kl']:.4f} in any slice "
        f"(budget {args.budget_slices:g}); {summary['trigger_rate']:.0%} of the updates asked for more."
    )


def main(args: argparse.Namespace) -> STEPOptimizer:
    """Train; print how far every update wanted to move the policy, and did."""
    torch.manual_seed(args.seed)
    sampler, control = Sampler(args), control_observations(args)
    policy = Policy(control.shape[1], sampler.envs.single_action_space)
    critic = mlp(control.shape[1], 1, last_gain=1.0)
    parameters = [*policy.parameters(), *critic.parameters()]  # a shorter step is a shorter step of both
    if args.controller == "none":
        args.budget_mean = args.budget_slices = math.inf
    optimizer = STEPOptimizer(
        torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5),
        kl=PolicyKL(lambda: policy(control), slices=slices_of(control, args.env_id)),
        budget=Budget(mean=args.budget_mean, slices=args.budget_slices),
        controller=CONTROLLERS[args.controller](),
        log=args.log or None,
    )
    steps = max(1, min(args.num_steps, args.total_steps // args.num_envs))
    for _ in range(max(1, args.total_steps // (steps * args.num_envs))):
        rollout = sampler.rollout(policy, critic, steps)
        optimizer.note(reward=float(np.mean(sampler.returns)) if sampler.returns else None)
        with optimizer.window():  # all inner steps of this update are one candidate, audited once
            for _ in range(EPOCHS):
                for rows in torch.randperm(len(rollout.actions)).split(MINIBATCH):
                    optimizer.zero_grad()
                    loss_of(policy, critic, Rollout(*(column[rows] for column in rollout))).backward()
                    nn.utils.clip_grad_norm_(parameters, 0.5)
                    optimizer.step()
        print(describe(optimizer.last))
    sampler.envs.close()
    report(optimizer, args)
    return optimizer


if __name__ == "__main__":
    torch.set_num_threads(1)  # networks as small as these are faster on one
    main(parse_args())
