"""How strongly each cap pulls at the next step: dual variables, as shares of the loss's own gradient.

Before the inner step, shares s_j of the gradients n_j of the caps' drifts are
added to the gradient g of the loss with respect to what the policy reads,

    g + ‖g‖ sum_j s_j n_j / ‖n_j‖,

so that proposals come out near the caps. A share follows how far the last
candidate was beyond its cap, q = drift / (aim * cap): s <- s q^RATE. (A dual
variable, raised while its constraint is violated and lowered while it is slack;
PID-Lagrangian methods, Stooke et al. 2020.) What runs away with a multiplier in
the loss's units is bounded here: together the shares are 1 at most, so that the
pull is never stronger than the loss, whatever its scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

PROMPTS = 4
"""Of the pool, on which a pull is measured."""

FIRST = 0.3
"""The share that a cap begins with."""

RATE = 0.1
"""A candidate e times beyond its cap raises the share by this exponent, ten steps of it e times."""

MOST = math.e
"""Of q and 1/q, that one step counts."""

NEAR = 0.5
"""Part of a cap from which on it pulls; before, nothing is measured."""

LEAST = 0.01
"""A share below this ends where the cap is not near, so that nothing is measured any more."""


def next_shares(shares: Mapping[str, float], ratios: Mapping[str, float], aim: float) -> dict[str, float]:
    """Return the shares of the next step.

    Args:
        shares: of this step, by cap.
        ratios: drift / cap of the candidate, by constraint; others than caps do not pull.
        aim: part of a cap that candidates should come to.

    >>> next_shares({}, {"mean": 3.0, "drift": 0.2, "drift:math": 0.8}, aim=0.9)
    {'drift:math': 0.3}
    """
    found = {}
    for name, ratio in ratios.items():
        if not name.startswith("drift") or not math.isfinite(ratio):
            continue
        if name not in shares:
            if ratio > NEAR:
                found[name] = FIRST
            continue
        share = shares[name] * min(max(ratio / aim, 1 / MOST), MOST) ** RATE
        if share >= LEAST or ratio > NEAR:
            found[name] = max(share, LEAST)
    total = max(1.0, sum(found.values()))
    return {name: share / total for name, share in found.items()}


def check_shares(shares: Mapping[str, float]) -> None:
    """Refuse a checkpoint's shares that are none, by any exception."""
    for name, share in shares.items():
        if not name.startswith("drift") or not 0 < share <= 1:
            raise ValueError(f"pull[{name!r}]={share!r} is no share of a cap")
