"""The smallest movement that an audit can tell from rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from step_optim.language_models import output_head
from step_optim.movement import Movement

CANDIDATES = 4
"""Weights that are tried for the probe: nothing may depend on one yet, as on LoRA's A next to a B of zeros."""

LARGE = 2.0**-6
"""The large probe moves every element of one weight by this part of itself."""

TINY_ULPS, TINY_EVERY = 1, 16
"""The tiny probe moves every 16th by one unit in the last place, so that everything behind it is rounded anew."""


@dataclass(frozen=True)
class NoiseFloor:
    """What an audit reads where there is next to nothing to read [nats per token]."""

    measured: Movement
    """The reading of a known tiny movement; nearly all of it is rounding. A budget below it compares with noise."""

    expected: float
    """What that movement is: a large one scaled down, since a small KL grows with the square of the movement."""

    dtype: torch.dtype
    """That the weights had in the audit."""

    def above(self, limits: Mapping[str, float]) -> list[str]:
        """Describe the limits below the floor; their names are "mean" or a slice's, their values nats per token."""
        floors = {"mean": self.measured.mean, **self.measured.slices}
        return [
            f"{name}: budget {limit:.3g}, noise floor {floors[name]:.3g}"
            for name, limit in limits.items()
            if 0 < limit < floors.get(name, 0.0)
        ]

    @property
    def name(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")

    def to_dict(self) -> dict[str, Any]:
        """For the log."""
        return {"measured": self.measured.to_dict(), "expected": self.expected, "dtype": self.name}


def probe_weights(model: nn.Module) -> list[nn.Parameter]:
    """Some weights that everything behind them depends on: vectors (a norm's) first, none that the head reads.

    Scaling has to move them: no zeros.
    """
    head = output_head(model)
    tied = set() if head is None else {id(p) for p in head.parameters()}
    able = [
        p for p in model.parameters() if p.is_floating_point() and id(p) not in tied and not hasattr(p, "placements")
    ]
    moving = (p for p in sorted(able, key=lambda p: p.dim()) if bool(p.detach().any()))
    return list(islice(moving, CANDIDATES))


def probes(weight: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Yield the weight moved a lot, then moved next to nothing, each with the size of the relative movement."""
    for size, every in ((LARGE, 1), (TINY_ULPS * torch.finfo(weight.dtype).eps, TINY_EVERY)):
        moved = weight.detach().clone(memory_format=torch.contiguous_format)
        flat = moved.view(-1)
        flat[::every] *= 1 + size
        flat[every :: 2 * every] *= (1 - size) / (1 + size)
        yield moved, size / every**0.5
