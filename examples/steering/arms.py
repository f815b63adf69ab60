"""What is compared: ways to learn a task and stay near the model from before."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from step_optim import Budget, Controller, Interpolate, Steer

CAP = 0.05
"""On the drift from the model before training, nats per token."""

ALL = 10**6
"""Prompts of the pool: as many as there are."""


@dataclass(frozen=True)
class Arm:
    """One way."""

    label: str
    controller: Controller = field(default_factory=Interpolate)
    capped: bool = False
    """Whether the drift on the control set is capped."""
    pool: int = 0
    """How many prompts directions come from that do not judge; 0: the control set's."""
    beta: float = 0.0
    """Of a KL penalty in the loss, on four prompts of the pool at every step."""

    @property
    def budget(self) -> Budget:
        """A cap, or none."""
        return Budget(drift=CAP) if self.capped else Budget(mean=math.inf)


ARMS: dict[str, Arm] = {
    "bare": Arm("AdamW alone"),
    "penalty_0.3": Arm("KL penalty, β 0.3", pool=ALL, beta=0.3),
    "penalty_1": Arm("KL penalty, β 1", pool=ALL, beta=1.0),
    "penalty_3": Arm("KL penalty, β 3", pool=ALL, beta=3.0),
    "shrink": Arm("cap, Interpolate", capped=True),
    "steer_control": Arm("cap, Steer without a pool", Steer(), capped=True),
    "steer": Arm("cap, Steer with a pool", Steer(), capped=True, pool=ALL),
    "steer_pull": Arm("cap, Steer with a pool and the pull", Steer(pull=True), capped=True, pool=ALL),
    "steer_penalty": Arm("cap, Steer with a pool, KL penalty β 1", Steer(), capped=True, pool=ALL, beta=1.0),
}
"""By the names of their files."""

OPTIONS: dict[str, Any] = {
    "aim": (0.8, 0.95, 1.0),
    "average": (0.0, 0.5, 0.7, 0.95),
    "far": (2.0, 20.0),
    "corrections": (1, 5),
    "prompts": (4, 8, 32),
}
"""Of `Steer`, around its defaults."""


def _grid() -> dict[str, Arm]:
    found = {}
    for pull in (False, True):
        more = ", pull" if pull else ""
        found["pull" if pull else "default"] = Arm(f"Steer{more}", Steer(pull=pull), capped=True, pool=ALL)
        for name, values in OPTIONS.items():
            for value in values:
                steer = Steer(pull=pull, **{name: value})
                key = f"{name}_{value:g}{'_pull' if pull else ''}"
                found[key] = Arm(f"{name}={value:g}{more}", steer, capped=True, pool=ALL)
        for size in (8, 24):
            key = f"pool_{size}{'_pull' if pull else ''}"
            found[key] = Arm(f"a pool of {size}{more}", Steer(pull=pull), capped=True, pool=size)
    return found


GRID = _grid()
"""One option at a time, with and without the pull."""


def arm_of(name: str) -> Arm:
    """Find an arm by name."""
    return (ARMS | GRID)[name]
