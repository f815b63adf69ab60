"""The smallest movement that an audit can tell from rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from step_optim.movement import Movement

SIZES = tuple(2.0**-k for k in (6, 10, 14, 18, 22))
"""By which part of itself a weight is moved, root mean square. The first is a movement that any audit can read."""

FEWEST = 2.0**-5
"""The smallest movement in units in the last place: every 1024th element by one. In 16-bit weights that is the least
which moves anything, and everything behind it is rounded anew."""

NOISY = 10.0
"""How many times what the first one predicts a reading has to be, to be rounding and not movement."""

AWAY = 0.1
"""By which part of itself, root mean square, a weight is moved away from where it begins; zeros by this much."""

MOST = 2**24
"""Elements that are moved at most: the constant weights first, then the smallest."""


@dataclass(frozen=True)
class NoiseFloor:
    """What an audit reads where there is next to nothing to read [nats per token]."""

    measured: Movement
    """The reading of a known small movement; nearly all of it is rounding. A budget below it compares with noise."""

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


def trained_weights(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return what to move in order to see what training will: what is trained; everything, if nothing is yet.

    `MOST` elements in all. Those come first that all elements begin with one value in (LoRA's B, gates, biases): what
    they do cannot be seen before they move.
    """
    able = [p for p in parameters if p.is_floating_point() and not hasattr(p, "placements") and p.device.type != "meta"]
    able = [p for p in dict.fromkeys(able) if p.numel() > 0]
    trained = [p for p in able if p.requires_grad] or able
    trained.sort(key=lambda p: (not _constant(p), p.numel()))
    sizes = accumulate(p.numel() for p in trained)
    return [p for i, (p, size) in enumerate(zip(trained, sizes, strict=True)) if size <= MOST or i == 0]


def _constant(weight: Tensor) -> bool:
    return bool((weight.detach() == weight.detach().flatten()[0]).all())


@torch.no_grad()
def moved_away(weights: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return a copy of each weight, by the id of the weight, that is moved at random by the part `AWAY` of itself."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    moved = {}
    for weight in weights:
        size = float(weight.float().square().mean().sqrt()) or 1.0
        noise = torch.randn(weight.shape, generator=generator, device="cpu", dtype=torch.float32)
        moved[id(weight)] = weight.detach() + (AWAY * size * noise).to(weight)
    return moved


def measure_noise(
    read: Callable[[Mapping[int, Tensor]], Movement], start: Mapping[int, Tensor], dtype: torch.dtype
) -> NoiseFloor | None:
    """Read movements of known sizes, down to next to nothing.

    K of a small movement grows with its square, so the first size predicts what the others are. What reads `NOISY`
    times as much or more is rounding: of the weights, or wherever the model computes in narrower numbers.

    Args:
        read: measures, from ``start``, the weights that it is given by id.
        start: where the movements begin.
        dtype: of the weights in the audit.

    Returns:
        The largest such reading; without one that of the smallest size. None if no movement reads anything.
    """
    sizes = list(dict.fromkeys(max(size, *(_smallest(weight) for weight in start.values())) for size in SIZES))
    readings = [read({key: moved_by(weight, size) for key, weight in start.items()}) for size in sizes]
    found = [
        NoiseFloor(reading, readings[0].mean * (size / sizes[0]) ** 2, dtype)
        for reading, size in zip(readings, sizes, strict=True)
    ]
    noisy = [floor for floor in found if floor.measured.mean > NOISY * floor.expected]
    if not any(reading.mean > 0 for reading in readings):
        return None
    return max(noisy, key=lambda floor: floor.measured.mean) if noisy else found[-1]


def _smallest(weight: Tensor) -> float:
    return FEWEST * torch.finfo(weight.dtype).eps


@torch.no_grad()
def moved_by(weight: Tensor, size: float) -> Tensor:
    """Return the weight times 1 ± size; where its dtype has no such number, some elements move by their last bit."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    signs = torch.randint(0, 2, weight.shape, generator=generator, device="cpu").to(weight) * 2 - 1
    eps = torch.finfo(weight.dtype).eps
    if size >= eps:
        return weight * (1 + size * signs)
    chosen = torch.rand(weight.shape, generator=generator, device="cpu") < (size / eps) ** 2
    return torch.where(chosen.to(weight.device), weight * (1 + eps * signs), weight)
