"""Limits: the budgets in force at one step as plain numbers, and whether a movement is within them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from step_optim.movement import Movement


@dataclass(frozen=True)
class Verdict:
    """Whether a movement is within its limits, and which limit is nearest or most exceeded."""

    ratios: Mapping[str, float]
    """KL / budget by constraint: ``"mean"``, ``"slice:<name>"``, ``"drift"``, ``"drift:<name>"``; no infinite ones."""

    finite: bool = True
    """False if a measured figure, or the update itself, is NaN or infinite: never feasible."""

    @property
    def feasible(self) -> bool:
        """K_global <= eps_g, K_s <= eps_s for every slice, the same for drift and its caps, all of them finite."""
        return self.finite and all(ratio <= 1 for ratio in self.ratios.values())

    @property
    def binding(self) -> str | None:
        """The constraint with the largest KL / budget; None if no budget is finite."""
        if not self.ratios:
            return None
        return max(self.ratios, key=lambda name: math.inf if math.isnan(self.ratios[name]) else self.ratios[name])


@dataclass(frozen=True)
class Limits:
    """The budgets in force at one step: plain numbers in nats per token, inf where unlimited."""

    mean: float = math.inf
    """eps_g, for K_global."""

    slices: Mapping[str, float] = field(default_factory=dict)
    """eps_s for each slice."""

    drift: float = math.inf
    """Cap on the global drift from pi_ref."""

    drift_slices: Mapping[str, float] = field(default_factory=dict)
    """Cap on the drift of each slice."""

    @property
    def reference(self) -> float:
        """Another name of `drift`."""
        return self.drift

    @property
    def caps_drift(self) -> bool:
        """Whether any cap is finite, so that a point has to be compared with pi_ref too."""
        return min(self.drift, *self.drift_slices.values(), math.inf) < math.inf

    @property
    def limits_anything(self) -> bool:
        """Whether any part is finite."""
        return self.caps_drift or min(self.mean, *self.slices.values(), math.inf) < math.inf

    def of(self, name: str) -> float:
        """Return the limit of a constraint, by its name in `Verdict.ratios`.

        >>> Limits(mean=0.03, drift_slices={"safety": 0.01}).of("drift:safety")
        0.01
        """
        kind, _, part = name.partition(":")
        if part:
            return (self.drift_slices if kind == "drift" else self.slices)[part]
        return self.drift if kind == "drift" else self.mean

    def without_caps(self) -> Limits:
        """Return the budgets on the step alone."""
        return Limits(self.mean, self.slices)

    def exceeded_by(self, drift: Movement | None) -> tuple[str, ...]:
        """Return the caps that a drift is beyond: ``"drift"``, ``"drift:<slice>"``."""
        if drift is None or not self.caps_drift:
            return ()
        caps = self.without_budgets().judge(drift.still(), drift).ratios
        return tuple(name for name, ratio in caps.items() if ratio > 1)

    def without_budgets(self) -> Limits:
        """Return the caps on the drift alone."""
        return Limits(drift=self.drift, drift_slices=self.drift_slices)

    def on_the_way_back(self, drift: Movement | None) -> Limits:
        """Return the limits of a step from a policy with this drift: a cap that it exceeds becomes "less than now".

        A run that was resumed with a lower cap could otherwise never come back.

        >>> Limits(drift=0.05).on_the_way_back(Movement(0.09)).judge(Movement(0.01), Movement(0.08)).feasible
        True
        """
        if not self.exceeded_by(drift):
            return self
        assert drift is not None

        def less(cap: float, now: float) -> float:
            return math.nextafter(now, 0.0) if now > cap else cap

        slices = {name: less(cap, drift.slices[name]) for name, cap in self.drift_slices.items()}
        return replace(self, drift=less(self.drift, drift.mean), drift_slices=slices)

    def judge(self, movement: Movement, drift: Movement | None = None) -> Verdict:
        """Compare a movement (and the drift from pi_ref) with these limits.

        The paper's trust region (section 3.2): K_global <= eps_g and max_s K_s <= eps_s.

        >>> Limits(mean=0.03).judge(Movement(0.06)).ratios
        {'mean': 2.0}

        Raises:
            ValueError: a limited slice, or the drift, was not measured.
        """
        measured = [("mean", movement.mean, self.mean)]
        measured += [(f"slice:{name}", kl, cap) for name, kl, cap in _slices(movement, self.slices, "slices")]
        if self.caps_drift:
            if drift is None:
                raise ValueError("budget.drift needs a KL closure that measures drift (TokenKL, PolicyKL)")
            measured.append(("drift", drift.mean, self.drift))
            measured += [
                (f"drift:{name}", kl, cap) for name, kl, cap in _slices(drift, self.drift_slices, "drift_slices")
            ]
        ratios = {name: _ratio(kl, limit) for name, kl, limit in measured if limit < math.inf}
        return Verdict(ratios, finite=movement.is_finite and (drift is None or drift.is_finite))


def _slices(movement: Movement, limits: Mapping[str, float], part: str) -> Iterator[tuple[str, float, float]]:
    """Yield (slice, what it reads, its limit)."""
    for name, limit in limits.items():
        if name not in movement.slices:
            raise ValueError(f"budget.{part} limits {name!r}, but the KL closure measured {sorted(movement.slices)}")
        yield name, movement.slices[name], limit


def _ratio(kl: float, limit: float) -> float:
    if limit > 0:
        return kl / limit
    return 0.0 if kl == 0 else math.inf
