"""For the user's own loss: references of KL penalties, and what PPO needs of them."""

from step_optim.objective.ppo import AdaptiveKL, TargetKL, sampled_kl
from step_optim.objective.references import (
    EMAReference,
    FixedReference,
    RatchetReference,
    Reference,
    ReferenceAction,
)

__all__ = [
    "AdaptiveKL",
    "EMAReference",
    "FixedReference",
    "RatchetReference",
    "Reference",
    "ReferenceAction",
    "TargetKL",
    "sampled_kl",
]
