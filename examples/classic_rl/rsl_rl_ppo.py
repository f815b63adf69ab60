"""PPO in the style of rsl_rl: a runner, an algorithm and a storage of tensors, over many environments in torch.

The lines that STEP adds end in ``# STEP``.

    python examples/classic_rl/rsl_rl_ppo.py
    python examples/classic_rl/rsl_rl_ppo.py --budget inf     # measures, and limits nothing

Shapes: T steps of E environments in one rollout, D numbers in an observation, A in an action.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from step_optim import PolicyKL, STEPOptimizer  # STEP


class Reach:
    """E points on a plane that push themselves to the origin; an episode takes at most 50 steps."""

    observations, actions = 4, 2

    def __init__(self, envs: int, device: str) -> None:
        self.envs, self.device = envs, device
        self.place, self.speed = torch.zeros(envs, 2, device=device), torch.zeros(envs, 2, device=device)
        self.age = torch.zeros(envs, dtype=torch.long, device=device)
        self._begin(torch.ones(envs, dtype=torch.bool, device=device))

    def _begin(self, which: Tensor) -> None:
        fresh = torch.rand(self.envs, 2, device=self.device) * 2 - 1
        self.place = torch.where(which[:, None], fresh, self.place)
        self.speed = torch.where(which[:, None], 0.0, self.speed)
        self.age = torch.where(which, 0, self.age)

    def observe(self) -> Tensor:
        """Return places and speeds [E, 4]."""
        return torch.cat([self.place, self.speed], dim=1)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Push by actions [E, 2]; return observations, rewards [E] and which episodes have ended [E]."""
        self.speed = 0.9 * self.speed + 0.1 * actions.clamp(-1, 1)
        self.place = (self.place + 0.1 * self.speed).clamp(-2, 2)
        self.age += 1
        rewards, ended = -self.place.norm(dim=1), self.age >= 50
        self._begin(ended)
        return self.observe(), rewards, ended


class ActorCritic(nn.Module):
    """A Gaussian policy and a value."""

    def __init__(self, observations: int, actions: int) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(observations, 32), nn.ELU(), nn.Linear(32, actions))
        self.critic = nn.Sequential(nn.Linear(observations, 32), nn.ELU(), nn.Linear(32, 1))
        self.std = nn.Parameter(0.5 * torch.ones(actions))

    def policy(self, observations: Tensor) -> Independent:
        """Observations [N, D] -> N distributions over actions [A]."""
        return Independent(Normal(self.actor(observations), self.std.clamp_min(1e-2).expand(len(observations), -1)), 1)


class RolloutStorage:
    """T steps of E environments; the next rollout is written over the last one."""

    def __init__(self, steps: int, env: Reach) -> None:
        def tensor(*shape: int) -> Tensor:
            return torch.zeros(steps, env.envs, *shape, device=env.device)

        self.observations, self.actions = tensor(env.observations), tensor(env.actions)
        self.rewards, self.dones, self.values, self.log_probs = tensor(), tensor(), tensor(), tensor()
        self.returns, self.advantages = tensor(), tensor()

    def compute_returns(self, last_values: Tensor, gamma: float, lam: float) -> None:
        """Fill in returns, and advantages that are normalised over the rollout."""
        ahead, following = torch.zeros_like(last_values), last_values
        for t in reversed(range(len(self.rewards))):
            open_ = 1 - self.dones[t]
            ahead = self.rewards[t] + gamma * open_ * following - self.values[t] + gamma * lam * open_ * ahead
            self.returns[t], following = ahead + self.values[t], self.values[t]
        advantages = self.returns - self.values
        self.advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)

    def minibatches(self, epochs: int, count: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield (observations, actions, log-probabilities, advantages, returns) of each minibatch."""
        columns = self.observations, self.actions, self.log_probs, self.advantages, self.returns
        flat = [column.flatten(0, 1) for column in columns]
        for _ in range(epochs):
            for rows in torch.randperm(len(flat[0]), device=flat[0].device).chunk(count):
                yield tuple(column[rows] for column in flat)


class PPO:
    """The algorithm: acts, and updates the policy on a storage."""

    def __init__(self, policy: ActorCritic, storage: RolloutStorage, learning_rate: float, budget: float) -> None:
        self.policy, self.storage = policy, storage
        inner = torch.optim.Adam(policy.parameters(), lr=learning_rate)
        self.kl = PolicyKL(policy.policy, observations=storage.observations.flatten(0, 1), model=policy)  # STEP
        self.optimizer = STEPOptimizer(inner, self.kl, budget=budget)  # STEP

    def update(self) -> None:
        """Go over the storage in epochs of minibatches."""
        self.kl.observe(self.storage.observations.flatten(0, 1))  # STEP
        with self.optimizer.window():  # STEP
            for observations, actions, log_probs, advantages, returns in self.storage.minibatches(5, 4):
                policy = self.policy.policy(observations)
                ratio = (policy.log_prob(actions) - log_probs).exp()
                surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
                value_loss = (self.policy.critic(observations).squeeze(-1) - returns).square().mean()
                loss = value_loss - surrogate - 0.005 * policy.entropy().mean()
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
                self.optimizer.step()


class OnPolicyRunner:
    """Collects rollouts and lets the algorithm learn from them."""

    def __init__(self, env: Reach, steps: int, learning_rate: float, budget: float) -> None:
        self.env, self.storage = env, RolloutStorage(steps, env)
        policy = ActorCritic(env.observations, env.actions).to(env.device)
        self.alg = PPO(policy, self.storage, learning_rate, budget)

    @torch.no_grad()
    def collect(self) -> float:
        """Fill the storage; return the mean reward of a step."""
        policy, storage, observations = self.alg.policy, self.storage, self.env.observe()
        for t in range(len(storage.rewards)):
            distribution = policy.policy(observations)
            storage.observations[t], storage.actions[t] = observations, distribution.sample()
            storage.log_probs[t] = distribution.log_prob(storage.actions[t])
            storage.values[t] = policy.critic(observations).squeeze(-1)
            observations, storage.rewards[t], ended = self.env.step(storage.actions[t])
            storage.dones[t] = ended.float()
        storage.compute_returns(policy.critic(observations).squeeze(-1), gamma=0.98, lam=0.95)
        return float(storage.rewards.mean())

    def learn(self, iterations: int) -> None:
        """Alternate between rollouts and updates; print one line for each."""
        for iteration in range(iterations):
            reward = self.collect()
            self.alg.update()
            last = self.alg.optimizer.last
            accepted = 0.0 if last.accepted is None else last.accepted.mean
            print(
                f"iteration {iteration:3}  reward {reward:7.3f}  {last.action}  "
                f"KL {last.candidate.mean:.4f} -> {accepted:.4f}"
            )


def main() -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.02, help="largest movement of one update [nats per action]")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="of Adam")
    parser.add_argument("--envs", type=int, default=256, help="environments side by side")
    parser.add_argument("--steps", type=int, default=24, help="steps of each in one rollout")
    parser.add_argument("--iterations", type=int, default=60, help="rollouts, with an update each")
    parser.add_argument("--device", default="cpu", help="of everything")
    args = parser.parse_args()
    torch.manual_seed(0)
    runner = OnPolicyRunner(Reach(args.envs, args.device), args.steps, args.learning_rate, args.budget)
    runner.learn(args.iterations)


if __name__ == "__main__":
    main()
