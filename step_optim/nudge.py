"""Trained weights, moved for the time of a reading: what an audit reads there is movement, or it is rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from step_optim.movement import Movement
from step_optim.noise import NoiseFloor
from step_optim.stand_ins import standing_in

SIZES = (2.0**-6, 2.0**-12, 2.0**-18, 2.0**-24)
"""Root mean square of the relative movements, from one that every policy shows to one that float32 can hardly hold."""

EXCESS = 8.0
"""A small KL grows with the square of the movement. A reading that is more than this times what the largest movement
lets expect is rounding; a sensitive weight, and a large movement that saturates, are within it."""

JUMP = 0.5
"""What stays above this part of the largest movement's reading is a policy that jumps, not rounding: even 8 bits of
mantissa round by a quarter of that movement. (torch's Householder parametrization cuts a sign to an integer.)"""

GOLDEN = 0.6180339887
"""The fractional parts of its multiples are spread over [0, 1] without a pattern that a layer could cancel."""


@dataclass
class Weight:
    """A trained tensor, and where modules hold it: in several places if it is tied."""

    tensor: Tensor
    places: list[tuple[nn.Module, str]] = field(default_factory=list)


def trained_weights(modules: Iterable[nn.Module]) -> list[Weight]:
    """Find what is trained among the parameters that these modules hold themselves. Shards of FSDP2 are left out."""
    found: dict[int, Weight] = {}
    for module in modules:
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad and p.is_floating_point() and not hasattr(p, "placements"):
                found.setdefault(id(p), Weight(p)).places.append((module, name))
    return list(found.values())


@contextmanager
def nudged(weights: Sequence[Weight], size: float) -> Iterator[float]:
    """Let the modules hold moved copies of the weights; the weights themselves are not written.

    It holds a copy of all of them at once.

    Args:
        weights: what is moved.
        size: root mean square of the relative movement of each.

    Yields:
        The movement that is left of it in the weights' dtype, Σ ‖moved - weight‖².
    """
    moved = {id(weight.tensor): _moved(weight.tensor.detach(), size) for weight in weights}
    total = 0.0
    for weight in weights:
        away = moved[id(weight.tensor)].double() - weight.tensor.detach().double()
        total += float(away.square().sum())
    holders = dict.fromkeys(module for weight in weights for module, _ in weight.places)
    with standing_in(holders, moved):
        yield total


def _moved(weight: Tensor, size: float) -> Tensor:
    """A moved copy: few elements by an ulp where all of them by less would be rounded away.

    Elements keep their signs. A weight of zeros has no scale of its own; it
    moves by up to ``size``, upwards.
    """
    eps = torch.finfo(weight.dtype).eps
    every = min(max(1, round((eps / size) ** 2)), max(1, weight.numel()))
    moved = weight.clone(memory_format=torch.contiguous_format)
    flat = moved.view(-1)
    turns = torch.arange(flat.numel(), device=weight.device, dtype=torch.float32).mul_(GOLDEN).frac_()
    if not bool(weight.any()):
        return flat.add_((size * turns).to(weight.dtype)).view(weight.shape)
    away = 1 + max(size, eps) * (turns[::every] - 0.5).sign()
    flat[::every] *= away.to(weight.dtype)
    return moved


def floor_of(readings: Sequence[tuple[Movement, float]], dtype: torch.dtype) -> NoiseFloor | None:
    """Find the largest reading that is rounding.

    Args:
        readings: of smaller and smaller movements, each with Σ ‖moved - weight‖².
        dtype: of the weights.

    Returns:
        The floor: the smallest reading if none is rounding; None if there is no finite reading, or the policy jumps.
    """
    (first, reach), (last, smallest) = readings[0], readings[-1]
    if first.mean == 0 or not all(moved.is_finite for moved, _ in readings):
        return None
    noisy = [(now, size) for now, size in readings[1:] if now.mean > EXCESS * first.mean * size / reach]
    floor, size = max(noisy, key=lambda reading: reading[0].mean) if noisy else (last, smallest)
    return None if floor.mean > JUMP * first.mean else NoiseFloor(floor, first.mean * size / reach, dtype)
