"""Limits: the budgets in force at one step as plain numbers, and whether a movement is within them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from step_optim.movement import Movement, Unmeasured
from step_optim.path_length import PathLength


@dataclass(frozen=True)
class Verdict:
    """Whether a movement is within its limits, and which limit is nearest or most exceeded."""

    ratios: Mapping[str, float]
    """Figure / budget by constraint: ``"mean"``, ``"slice:<name>"``, ``"prompt"``, ``"token"``, ``"drift"``,
    ``"drift:<name>"``; no infinite ones. The figure is the KL, or its upper confidence bound if that is asked for."""

    finite: bool = True
    """False if a measured figure, or the update itself, is NaN or infinite: never feasible."""

    @property
    def feasible(self) -> bool:
        """K_global <= eps_g, K_s <= eps_s for every slice, likewise for tails, drift and its caps, all finite."""
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

    prompt: float = math.inf
    """For the prompt that moves most."""

    token: float = math.inf
    """For the response token that moves most [nats]."""

    confidence: float | None = None
    """Whether the mean, slices and drift are judged by their upper bounds at this confidence; None by themselves."""

    path: float = math.inf
    """Cap on the path length: the sum of K_global over all committed steps."""

    path_slices: Mapping[str, float] = field(default_factory=dict)
    """Cap on the path length of each slice."""

    lowered: tuple[str, ...] = ()
    """Of ``"mean"`` and ``"slice:<name>"``, those whose limit is what a cap on the path has left; see `after`."""

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
        by_step = min(self.mean, self.prompt, self.token, *self.slices.values(), math.inf)
        return self.caps_drift or min(by_step, self.path, *self.path_slices.values()) < math.inf

    def of(self, name: str) -> float:
        """Return the limit of a constraint, by its name in `Verdict.ratios`, or in `told`.

        >>> Limits(mean=0.03, drift_slices={"safety": 0.01}).of("drift:safety")
        0.01
        """
        kind, _, part = name.partition(":")
        if part:
            return {"slice": self.slices, "drift": self.drift_slices, "path": self.path_slices}[kind][part]
        return float(getattr(self, kind))

    def after(self, path: PathLength) -> Limits:
        """Return the limits of a step that begins after a path: no more than what is left of each cap on it.

        >>> limits = Limits(mean=0.03, path=0.5).after(PathLength(0.48))
        >>> round(limits.mean, 3), limits.lowered
        (0.02, ('mean',))
        """
        left = {"mean": path.left(self.path)}
        left |= {f"slice:{name}": path.left(cap, name) for name, cap in self.path_slices.items()}
        own = {"mean": self.mean} | {f"slice:{name}": limit for name, limit in self.slices.items()}
        less = {name: rest for name, rest in left.items() if rest < own.get(name, math.inf)}
        slices = {name.removeprefix("slice:"): rest for name, rest in less.items() if name != "mean"}
        return replace(self, mean=less.get("mean", self.mean), slices={**self.slices, **slices}, lowered=tuple(less))

    def told(self, constraint: str) -> str:
        """Return what a constraint is called in records and messages: ``"path"``, ``"path:<slice>"`` where that bound.

        >>> Limits(mean=0.02, path=0.5, lowered=("mean",)).told("mean")
        'path'
        """
        if constraint not in self.lowered:
            return constraint
        return "path" if constraint == "mean" else constraint.replace("slice:", "path:", 1)

    @staticmethod
    def judged_as(name: str) -> str:
        """Return what a constraint that is `told` is called in `Verdict.ratios`.

        >>> Limits.judged_as("path"), Limits.judged_as("path:math"), Limits.judged_as("drift")
        ('mean', 'slice:math', 'drift')
        """
        return "mean" if name == "path" else name.replace("path:", "slice:", 1) if name.startswith("path:") else name

    @property
    def used_up(self) -> tuple[str, ...]:
        """The constraints of which a cap on the path has left nothing: no step that moves the policy is within it."""
        return tuple(name for name in self.lowered if self.of(name) == 0)

    @property
    def as_set(self) -> dict[str, float]:
        """The finite budgets on the mean and the slices, by constraint, but for those that a path has lowered."""
        limits = {"mean": self.mean} | {f"slice:{name}": limit for name, limit in self.slices.items()}
        return {name: limit for name, limit in limits.items() if limit < math.inf and name not in self.lowered}

    def without_caps(self) -> Limits:
        """Return the budgets on the step alone."""
        return replace(self, drift=math.inf, drift_slices={})

    def exceeded_by(self, drift: Movement | None) -> tuple[str, ...]:
        """Return the caps that a drift is beyond: ``"drift"``, ``"drift:<slice>"``."""
        caps = [] if drift is None else self._drift_figures(drift)
        return tuple(name for name, kl, cap in caps if _ratio(kl, cap) > 1)

    def without_budgets(self) -> Limits:
        """Return the caps on the drift alone."""
        return Limits(drift=self.drift, drift_slices=self.drift_slices, confidence=self.confidence)

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

        slices = {name: less(cap, self._figure(drift, name)) for name, cap in self.drift_slices.items()}
        return replace(self, drift=less(self.drift, self._figure(drift)), drift_slices=slices)

    def judge(self, movement: Movement, drift: Movement | None = None) -> Verdict:
        """Compare a movement (and the drift from pi_ref) with these limits.

        The paper's trust region (section 3.2): K_global <= eps_g and max_s K_s <= eps_s.

        >>> Limits(mean=0.03).judge(Movement(0.06)).ratios
        {'mean': 2.0}

        Raises:
            ValueError: a limited figure, or the drift, was not measured.
        """
        figures = [*self._step_figures(movement), *self._drift_figures(drift)]
        ratios = {name: _ratio(kl, limit) for name, kl, limit in figures}
        return Verdict(ratios, finite=movement.is_finite and (drift is None or drift.is_finite))

    def reading(self, name: str, movement: Movement) -> float:
        """Return what a movement, or a drift, reads that is held against a limit, by its name in `told`."""
        name = self.judged_as(name)
        figures = self._drift_figures if name.startswith("drift") else self._step_figures
        return next(kl for constraint, kl, _ in figures(movement) if constraint == name)

    def bounds(self, movement: Movement, drift: Movement | None) -> dict[str, float]:
        """Return the upper confidence bounds that were held against these limits, by constraint; none without any."""
        if self.confidence is None or not movement.is_finite:
            return {}
        figures = [*self._step_figures(movement), *self._drift_figures(drift)]
        return {name: kl for name, kl, _ in figures if name not in ("prompt", "token")}

    def at_rest(self, drift: Movement | None = None) -> Verdict:
        """Judge theta_t itself: it has not moved, and has drifted so far.

        >>> Limits(mean=0.03, drift=0.25).at_rest(Movement(0.125)).ratios
        {'mean': 0.0, 'drift': 0.5}
        """
        still = Movement.over([0.0, 0.0], {name: [0, 1] for name in self.slices}, token=0.0)
        return self.judge(still, drift)

    def _step_figures(self, movement: Movement) -> Iterator[tuple[str, float, float]]:
        """Yield (constraint, what a step reads, its limit) of the finite budgets."""
        if self.mean < math.inf:
            yield "mean", self._figure(movement), self.mean
        for name, limit in self.slices.items():
            if limit < math.inf:
                yield f"slice:{name}", self._of_slice(movement, name, "slices"), limit
        for name, limit in (("prompt", self.prompt), ("token", self.token)):
            if limit < math.inf:
                yield name, _tail(movement, name, limit), limit

    def _drift_figures(self, drift: Movement | None) -> Iterator[tuple[str, float, float]]:
        """Yield the same of the finite caps on the drift."""
        if not self.caps_drift:
            return
        if drift is None:
            raise ValueError("budget.drift needs a KL closure that measures drift (TokenKL, PolicyKL)")
        if self.drift < math.inf:
            yield "drift", self._figure(drift), self.drift
        for name, cap in self.drift_slices.items():
            if cap < math.inf:
                yield f"drift:{name}", self._of_slice(drift, name, "drift_slices"), cap

    def _of_slice(self, movement: Movement, name: str, part: str) -> float:
        if name not in movement.slices:
            raise ValueError(f"budget.{part} limits {name!r}, but the KL closure measured {sorted(movement.slices)}")
        return self._figure(movement, name)

    def _figure(self, movement: Movement, slice_: str | None = None) -> float:
        """What is held against a limit: the mean over all prompts or a slice, or its upper confidence bound."""
        if self.confidence is not None:
            bound = movement.upper(self.confidence, slice_)
            if bound == math.inf and movement.is_finite:
                raise Unmeasured(
                    f"budget.confidence={self.confidence} needs the spread over prompts, and "
                    f"{'the control set' if slice_ is None else f'slice {slice_!r}'} has one; give it at least two"
                )
            return bound
        return movement.mean if slice_ is None else movement.slices[slice_]


def _tail(movement: Movement, name: str, limit: float) -> float:
    """The largest KL of a prompt or a token."""
    kl: float | None = getattr(movement, name)
    if kl is None:
        raise Unmeasured(
            f"budget.{name}={limit:g} limits the worst {name}, which the KL closure does not measure; TokenKL does"
        )
    return kl


def _ratio(kl: float, limit: float) -> float:
    if limit > 0:
        return kl / limit
    return 0.0 if kl == 0 else math.inf
