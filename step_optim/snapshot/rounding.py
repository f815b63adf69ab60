"""What rounding makes of a part of an update, where the dtype of the weights has few numbers in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from step_optim.host.ranks import Ranks
from step_optim.snapshot.path import Path
from step_optim.snapshot.weights import Weights

SAMPLE = 1024
"""Elements of each tensor that are looked at."""


class Rounding:
    """The way from theta_t to the candidate, at `SAMPLE` evenly spread elements of each tensor that goes it.

    Args:
        weights: know both ends.
        path: the way between them; by default the straight line.
    """

    @torch.no_grad()
    def __init__(self, weights: Weights, path: Path | None = None) -> None:
        self._path, spared = path, set(weights.spared)
        self._ends = [
            (i, _sample(previous), _sample(candidate), shards * previous.numel())
            for i, (previous, candidate, shards) in enumerate(weights.ends())
            if previous.numel() > 0 and not previous.is_meta and i not in spared
        ]

    @torch.no_grad()
    def realised(self, alphas: Sequence[float], ranks: Ranks) -> list[float]:
        """Return <point - theta_t, candidate - theta_t> / ‖candidate - theta_t‖² for each alpha, over all ranks."""
        along, length = torch.zeros(len(alphas), dtype=torch.float64, device="cpu"), 0.0
        straight = torch.tensor(alphas, dtype=torch.float64, device="cpu")
        bent = (
            None if self._path is None else torch.tensor([self._path.parts(a) for a in alphas], device="cpu").double()
        )
        for i, previous, candidate, size in self._ends:
            parts = straight if bent is None else bent[:, i]
            way, weight = _wide(candidate) - _wide(previous), size / previous.numel()
            square = float((way * way.conj()).real.sum()) * weight
            length += square
            if not _is_coarse(previous):
                along += parts * square
                continue
            points = torch.lerp(previous.float(), candidate.float(), parts.to(previous.device).float()[:, None])
            along += ((_wide(points.to(previous.dtype)) - _wide(previous)) * way).sum(1).cpu() * weight
        found = ranks.exchange((along.tolist(), length))
        total = sum(length for _, length in found)
        return [
            sum(values) / total if total > 0 else 0.0 for values in zip(*(along for along, _ in found), strict=True)
        ]


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)].clone()


def _is_coarse(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
