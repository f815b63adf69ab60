"""The smallest movement that an audit can tell from rounding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from step_optim.movement import Movement

SIZES = tuple(2.0**-k for k in (6, 10, 14, 18, 22))
"""By which part of itself a weight is moved, root mean square. The first is a movement that any audit can read."""

EXCESS = 8.0
"""A small KL grows with the square of the movement. A reading that is more than this times what the first one lets
expect is rounding; a sensitive weight, and a large movement that saturates, are within it."""

JUMP = 0.5
"""What stays above this part of the largest movement's reading is a policy that jumps, not rounding: even 8 bits of
mantissa round by a quarter of the first movement. (torch's Householder parametrization cuts a sign to an integer.)"""

STILL = 1e-10
"""Nats that float32 rounding reads of a policy that does not move: of all logits of a row, when they are shifted."""

AWAY = 0.1
"""By which part of itself, root mean square, a weight is moved away from where it begins; zeros by this much."""

MOST = 2**24
"""Elements that are moved at most: the constant weights first, then the smallest."""


NOWHERE = Movement(math.nan)
"""What is read where there is no policy."""


@dataclass(frozen=True)
class NoiseFloor:
    """What an audit reads where there is next to nothing to read [nats per token]."""

    measured: Movement
    """The reading of a known small movement; nearly all of it is rounding. A budget below it compares with noise."""

    expected: float
    """What that movement is: a large one scaled down, since a small KL grows with the square of the movement."""

    dtype: torch.dtype
    """The narrowest that the audit was seen to compute in: that of the weights, or of what was read."""

    def above(self, limits: Mapping[str, float]) -> list[str]:
        """Describe the limits below the floor.

        Args:
            limits: nats per token; "mean", slices, "worst prompt" and "worst token".
        """
        measured = self.measured
        floors = {"mean": measured.mean, **measured.slices}
        floors |= {"worst prompt": measured.prompt or 0.0, "worst token": measured.token or 0.0}
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


@dataclass(frozen=True)
class Ladder:
    """Readings of smaller and smaller movements of one policy."""

    readings: Sequence[tuple[Movement, float]]
    """Each with the movement that was left of its size after rounding, Σ ‖moved - weight‖²."""

    largest: float
    """The mean of the largest movement of all, which is not among them if they begin where it ended."""

    @property
    def is_still(self) -> bool:
        """Whether even the largest movement reads nothing."""
        first, _ = self.readings[0]
        return first.is_finite and max(self.largest, first.mean) < STILL

    def floor(self, dtype: torch.dtype) -> NoiseFloor | None:
        """Find the largest reading that is rounding: of the weights, or wherever narrower numbers are computed.

        Args:
            dtype: of the audit.

        Returns:
            Where none is rounding the smallest that is not 0: less is lost.
            None if the first movement reads nothing, if a reading is not
            finite, or if the policy jumps.
        """
        first, reach = self.readings[0]
        if first.mean == 0 or not all(moved.is_finite for moved, _ in self.readings):
            return None
        noisy = [(now, size) for now, size in self.readings[1:] if now.mean > EXCESS * first.mean * size / reach]
        floor, size = max(noisy, key=lambda reading: reading[0].mean) if noisy else self._smallest
        if floor.mean > JUMP * max(self.largest, first.mean):
            return None
        return NoiseFloor(floor, first.mean * size / reach, dtype)

    @property
    def _smallest(self) -> tuple[Movement, float]:
        return [reading for reading in self.readings if reading[0].mean > 0][-1]


def read_ladder(
    weights: Sequence[Tensor],
    policy: Callable[[Mapping[int, Tensor]], Any],
    kl: Callable[[Any, Any], Movement],
    here: Any,
    dtype: torch.dtype | None = None,
) -> Ladder:
    """Read movements of known sizes, down to next to nothing.

    They begin from weights that are moved away, since what is 0 (LoRA's B)
    hides what is multiplied by it; or from the weights themselves, if those
    give no finite policy. The number of readings is the same either way:
    processes may find different answers, and stay in step.

    Args:
        weights: what is moved, at least one.
        policy: evaluates with other tensors in the place of weights, by id; None if they give no policy.
        kl: measures the first of two policies from the second.
        here: the policy of the weights as they are.
        dtype: what ``policy`` casts the weights to, if it does: a wider one takes smaller movements than their own.
    """
    start = moved_away(weights)
    there = policy(start)
    largest = NOWHERE if there is None else kl(there, here)
    if not largest.is_finite:
        start, there, largest = {id(w): w.detach() for w in weights}, here, Movement(0.0)
    start = {key: w if dtype is None else w.to(torch.promote_types(w.dtype, dtype)) for key, w in start.items()}
    readings = []
    for size in SIZES:
        moved = {key: moved_by(weight, size) for key, weight in start.items()}
        now = policy(moved)
        left = sum(_squared_distance(moved[key], weight) for key, weight in start.items())
        readings.append((NOWHERE if now is None else kl(now, there), left))
    return Ladder(readings, largest.mean)


def warn_of_still(weights: int, model: str, *, stacklevel: int) -> None:
    """Warn of a model whose trained weights the control set does not reach."""
    warnings.warn(
        f"no movement of the {weights} weights that are trained changes what {model} says on the control set: K would "
        "read 0 whatever training does. Train weights that the policy reads, or measure on prompts that reach them "
        "(images, for a vision tower: ControlSet.from_batches)",
        stacklevel=stacklevel,
    )


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


def narrowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the one that rounds most."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def is_narrow(dtype: torch.dtype) -> bool:
    """Return whether float32 tells numbers apart that are one number here."""
    return torch.finfo(dtype).eps > torch.finfo(torch.float32).eps


def _constant(weight: Tensor) -> bool:
    flat = _wide(weight.detach()).flatten()
    return bool((flat == flat[0]).all())


@torch.no_grad()
def moved_away(weights: Iterable[Tensor], part: float = AWAY, *, seed: int = 0) -> dict[int, Tensor]:
    """Return a copy of each weight, by the id of the weight, that is moved at random by a part of itself.

    Of a tensor of more than `MOST` elements as many are moved. The same weights in the same order are moved alike.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    moved = {}
    for weight in weights:
        size = float(_wide(weight).abs().square().mean().sqrt()) or 1.0
        moved[id(weight)], some = _copy_of(weight)
        noise = torch.randn(some.shape, generator=generator, device="cpu", dtype=torch.float32)
        some.copy_(_wide(some) + part * size * noise.to(some.device))
    return moved


@torch.no_grad()
def moved_by(weight: Tensor, size: float) -> Tensor:
    """Return the weight times 1 ± size; where its dtype has no such number, few elements are moved by their last bit.

    One is moved at least. Elements keep their signs. A weight of zeros has no
    scale of its own: it moves by up to ``size``, upwards.
    """
    generator = torch.Generator(device="cpu").manual_seed(1)
    eps = torch.finfo(weight.dtype).eps
    zeros = not bool(_wide(weight).any())
    moved, some = _copy_of(weight, 1.0 if zeros else (eps / size) ** 2)
    turns = torch.rand(some.shape, generator=generator, device="cpu", dtype=torch.float32).to(some.device)
    some.copy_(size * turns if zeros else _wide(some) * (1 + max(size, eps) * torch.where(turns < 0.5, -1, 1)))
    return moved


def _copy_of(weight: Tensor, every: float = 1.0) -> tuple[Tensor, Tensor]:
    """A copy, and a view of those of its elements that are to move: one in so many, and `MOST` at most."""
    moved = weight.detach().clone(memory_format=torch.contiguous_format)
    step = max(round(every), math.ceil(moved.numel() / MOST))
    return moved, moved.view(-1)[:: step | 1]  # an odd step comes to all columns of a matrix


def _squared_distance(moved: Tensor, weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(_wide(moved) - _wide(weight), dtype=torch.float64)) ** 2


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
