"""What is learned: environments of Gymnasium, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One environment."""

    env: str
    updates: int
    """Of 2,048 steps each, as stable-baselines3's PPO makes them by default."""
    low: float
    """What a policy that has learned nothing gets, about; curves are drawn from there."""
    high: float
    """What the task calls solved."""


TASKS = {
    "cartpole": Task("CartPole-v1", 20, 20, 500),
    "acrobot": Task("Acrobot-v1", 20, -500, -100),
    "pendulum": Task("Pendulum-v1", 50, -1400, -200),
    "lunarlander": Task("LunarLander-v3", 60, -200, 200),
    "mountaincar": Task("MountainCarContinuous-v0", 20, 0, 90),
}
"""By the names of their files."""
