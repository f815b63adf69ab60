"""Whether state holds copies of the weights: tensors that training moves, and that hold the weights where they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from step_optim.snapshot.known import ParamLike, known_copies
from step_optim.testing.probe import Probe, Setup
from step_optim.testing.verdict import STICKS

DEPTH = 7
QUIET = 12
_SEED = 6000


def are_copies(setup: Setup, param_like: ParamLike | None) -> bool:
    """Whether each of these moves with training, and zero-gradient steps keep a joint translation with the weights.

    A fixed starting point (MADGRAD's) does not move; what every step overwrites
    (D-Adaptation's) does not hold the weights anywhere.

    Args:
        setup: how to train.
        param_like: where they are; None for those that `STEPOptimizer` knows.
    """
    probe = Probe(setup).train_all(range(DEPTH))
    before = [copy.clone() for copy, _ in _pairs(probe, param_like)]
    probe.train_all(range(DEPTH, DEPTH + QUIET))
    now = [copy for copy, _ in _pairs(probe, param_like)]
    if not before or len(before) != len(now) or any(torch.equal(a, b) for a, b in zip(before, now, strict=True)):
        return False
    return _kept(setup, param_like) >= STICKS


def _kept(setup: Setup, param_like: ParamLike | None) -> float:
    """Smallest share of the translation that is in the weights at any later step."""
    still, moved = (Probe(setup).train_all(range(DEPTH)) for _ in range(2))
    way = -moved.weights
    _translate(moved, param_like)
    way += moved.weights
    shares = []
    for seed in range(_SEED, _SEED + QUIET):
        still.train(seed, quiet=True)
        moved.train(seed, quiet=True)
        shares.append(float((moved.weights - still.weights) @ way / (way @ way)))
    return min(shares)


@torch.no_grad()
def _translate(probe: Probe, param_like: ParamLike | None) -> None:
    together: dict[int, tuple[Tensor, Tensor]] = {id(p): (p, p) for p in probe.parameters if p.requires_grad}
    together |= {id(copy): (copy, p) for copy, p in _pairs(probe, param_like)}
    by = {id(p): 0.1 * float(p.float().square().mean().sqrt()) for p in probe.parameters}
    for tensor, p in together.values():
        tensor.add_(by[id(p)])


def _pairs(probe: Probe, param_like: ParamLike | None) -> Iterator[tuple[Tensor, Tensor]]:
    given = known_copies(probe.inner) if param_like is None else param_like
    if callable(given):
        yield from given(probe.inner)
        return
    for key in (given,) if isinstance(given, str) else given:
        for p in probe.parameters:
            copy = probe.inner.state.get(p, {}).get(key)
            if isinstance(copy, Tensor):
                yield copy, p
