"""Section "noise": what an audit reads where next to nothing moved, by the dtype that its body runs in."""

from __future__ import annotations

import torch
from progress import Progress
from workload import Workload

from step_optim import TokenKL

PROMPTS = 8
"""Of the control set: the floor is a mean, too."""


def measure_noise(workload: Workload, progress: Progress) -> list[dict[str, float | str]]:
    """The noise floor in float32 and in bfloat16, as `TokenKL` measures it."""
    model, control = workload.model("lora"), workload.control(PROMPTS)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        floor = TokenKL(model, control, audit_dtype=dtype).noise_floor
        assert floor is not None
        found.append({"dtype": floor.name, "measured": floor.measured.mean, "expected": floor.expected})
        progress.say(f"noise: {floor.name} reads {floor.measured.mean:.2g} nats")
    return found
