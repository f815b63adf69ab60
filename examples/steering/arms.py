"""What is compared: ways to learn a task and stay near the model from before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from step_optim import Budget, Controller, Interpolate, Steer

CAP = 0.05
"""On the drift from the model before training, nats per token."""


@dataclass(frozen=True)
class Arm:
    """One way."""

    label: str
    controller: Controller = field(default_factory=Interpolate)
    capped: bool = False
    """Whether the drift on the control set is capped."""
    pool: bool = False
    """Whether directions come from other prompts than those that judge."""
    beta: float = 0.0
    """Of a KL penalty in the loss, on four prompts of the pool at every step."""

    @property
    def budget(self) -> Budget:
        """A cap, or none."""
        return Budget(drift=CAP) if self.capped else Budget(mean=math.inf)


ARMS: dict[str, Arm] = {
    "bare": Arm("AdamW alone"),
    "penalty_0.3": Arm("KL penalty, β 0.3", pool=True, beta=0.3),
    "penalty_1": Arm("KL penalty, β 1", pool=True, beta=1.0),
    "penalty_3": Arm("KL penalty, β 3", pool=True, beta=3.0),
    "shrink": Arm("cap, Interpolate", capped=True),
    "steer_control": Arm("cap, Steer without a pool", Steer(), capped=True),
    "steer": Arm("cap, Steer with a pool", Steer(), capped=True, pool=True),
    "steer_pull": Arm("cap, Steer with a pool and the pull", Steer(pull=True), capped=True, pool=True),
}
"""By the names of their files."""
