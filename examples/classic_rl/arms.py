"""What is compared: PPO as it is, with early stopping, TRPO, and PPO inside a trust region after the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from step_optim import Controller, Gate, Interpolate


@dataclass(frozen=True)
class Arm:
    """One way to update the policy."""

    label: str
    family: str
    """Arms of one family differ in one number, which is tuned: the best of them is what is compared."""
    trpo: bool = False
    target_kl: float | None = None
    """Of stable-baselines3: PPO stops an update early beyond 1.5 times that, TRPO's line search keeps to it."""
    budget: float | None = None
    """On the mean KL of an update."""
    controller: Controller = field(default_factory=Interpolate)
    options: dict[str, Any] = field(default_factory=dict)
    """Further ones of the optimizer."""


TARGETS = (0.005, 0.01, 0.02, 0.05)
"""What each trust region is tuned over [nats]."""


def _arms() -> dict[str, Arm]:
    found = {"ppo": Arm("PPO", "ppo")}
    for kl in TARGETS:
        found |= {
            f"target_kl_{kl:g}": Arm(f"PPO, target_kl {kl:g}", "target_kl", target_kl=kl),
            f"trpo_{kl:g}": Arm(f"TRPO {kl:g}", "trpo", trpo=True, target_kl=kl),
            f"gate_{kl:g}": Arm(f"STEP, Gate, {kl:g}", "gate", budget=kl, controller=Gate()),
            f"step_{kl:g}": Arm(f"STEP, Interpolate, {kl:g}", "step", budget=kl),
            f"unread_{kl:g}": Arm(
                f"STEP, the critic keeps its step, {kl:g}", "unread", budget=kl, options={"keep": "unread"}
            ),
            f"rate_{kl:g}": Arm(f"STEP, adaptive rate, {kl:g}", "rate", budget=kl, options={"adaptive_rate": True}),
        }
    return found


ARMS = _arms()
"""By the names of their files."""

FAMILIES = {
    "ppo": "PPO",
    "target_kl": "PPO, target_kl",
    "trpo": "TRPO",
    "gate": "STEP, Gate",
    "step": "STEP, Interpolate",
    "unread": "STEP, the critic keeps its step",
    "rate": "STEP, adaptive rate",
}
"""What the lines of the figure are called."""
