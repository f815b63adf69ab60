"""Why steps are rejected in a row, and what helps in that case."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from step_optim.controllers.base import Point
from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.telemetry.record import TrialRecord

FINER = "Raise the budget, or keep the trained weights in float32"

AT_THE_CAP = 0.9
"""Part of the cap on drift from which on there is no room left for a useful step."""


@dataclass(frozen=True)
class Stall:
    """What is known when the latest of several steps in a row was rejected; as a text, what to do about it."""

    rejected: int
    """How many there were."""
    latest: Sequence[str]
    """The constraints that bound the latest of them, this one last."""
    candidate: Point
    """What this step proposed."""
    limits: Limits
    """The budgets in force."""
    update_norm: float
    """L2 norm of the proposed update."""
    tried: Sequence[TrialRecord] = ()
    """The parts of it that were tried."""
    drift: Movement | None = None
    """Of theta_t from pi_ref, if the cap on it is what bound."""
    still: Movement | None = None
    """What a plain function reads at theta_t, if that was looked at."""
    rounded: bool = False
    """Whether a search asked what rounding makes of smaller steps."""
    adaptive_rate: bool = False
    """Whether proposals follow what was over budget already."""

    def __str__(self) -> str:
        return f"{self.rejected} steps in a row were rejected, {self._by()}. {self._because()}"

    def _by(self) -> str:
        counts = Counter(self.latest)
        if len(counts) == 1:
            return f"by {_named(self.latest[-1])}"
        return f"the last {len(self.latest)} by " + ", ".join(f"{_named(name)} ({n})" for name, n in counts.items())

    def _because(self) -> str:
        bound = self.latest[-1]
        if bound == "not finite":
            return self._not_finite()
        if bound.startswith("drift"):
            return self._at_the_cap()
        if bound.startswith("path"):
            return self._at_the_end(bound)
        return self._too_far(self._read(self.candidate.movement), self.limits.of(bound))

    def _read(self, movement: Movement) -> float:
        """The figure that bound."""
        return self.limits.reading(self.latest[-1], movement)

    @property
    def _sure(self) -> str:
        """What to say of figures that are confidence bounds."""
        sure = self.limits.confidence
        bounded = sure is not None and self.latest[-1] not in ("prompt", "token")
        return f" (its upper bound at confidence {sure:g})" if bounded else ""

    def _not_finite(self) -> str:
        if math.isfinite(self.update_norm):
            return (
                f"The last update was finite, and its KL was not ({self.candidate.movement}). Look at what the KL "
                "closure evaluates; where a policy gives probability 0 to what the one before may do, no KL is finite"
            )
        return (
            "No part of an update with NaN or inf in it can be taken. Look at the loss and the gradients; clip them "
            "(torch.nn.utils.clip_grad_norm_), and in float16 use a GradScaler, which skips steps that overflow"
        )

    def _at_the_cap(self) -> str:
        assert self.drift is not None
        assert self.candidate.drift is not None
        slice_ = self.latest[-1].removeprefix("drift").removeprefix(":")
        cap = self.limits.drift_slices[slice_] if slice_ else self.limits.drift
        here, there = (self._read(moved) for moved in (self.drift, self.candidate.drift))
        told = (
            f"The last proposal was {there:.3g} nats per token from pi_ref{self._sure}, the cap is {cap:.3g}, and the "
            f"policy before the step is {here:.3g} from it"
        )
        if here < AT_THE_CAP * cap and not self.tried:
            return f"{told}: there is room for smaller steps. Lower the learning rate, or shrink with Interpolate()"
        if any(trial.alpha is None for trial in self.tried):
            return (
                f"{told}. The corrections along its gradient were not enough: raise the cap, Budget(drift=...); lower "
                "the learning rate; or give the KL closure a larger pool"
            )
        return (
            f"{told}. Smaller steps cannot help a policy that sits at the cap: take controller=Steer(), which leads "
            "steps back along the gradient of the drift and goes on learning; raise the cap, Budget(drift=...); pull "
            "the policy back by a KL penalty in the loss; or restart from an earlier checkpoint"
        )

    def _at_the_end(self, bound: str) -> str:
        asked, left = self._read(self.candidate.movement), self.limits.of(self.limits.judged_as(bound))
        return (
            f"The last proposal moved {asked:.3g} nats per token{self._sure}, and the cap on the path, "
            f"{self.limits.of(bound):.3g}, has {left:.3g} left for all steps to come. End the training "
            "here, raise the cap, or use up what is left with Interpolate() or a lower learning rate"
        )

    def _too_far(self, kl: float, limit: float) -> str:
        told = f"The last proposal moved {kl:.3g} nats per token{self._sure}, and {limit:.3g} are allowed"
        if limit == 0:
            return f"{told}: a budget of 0 lets no movement through. Raise it"
        slower = f"by about {math.sqrt(kl / limit):.3g} times (KL grows like its square)"
        if self.tried:
            return f"{told}. {self._no_part(kl, slower)}"
        if self.rounded:
            return f"{told}. In the dtype of the weights no smaller part of it is a step at all. {FINER}"
        also = "" if self.adaptive_rate else "pass adaptive_rate=True to STEPOptimizer, "
        return (
            f"{told}; steps that stay as long are rejected for ever. Lower the learning rate {slower}, raise the "
            f"budget, {also}or shrink: Interpolate() in the place of Gate()"
        )

    def _no_part(self, kl: float, slower: str) -> str:
        """Why a controller that shrinks found nothing, although theta_t itself is feasible."""
        on_line = [trial for trial in self.tried if trial.alpha is not None]
        least = min(on_line or self.tried, key=lambda trial: trial.alpha or 0.0)
        where = "off the line" if least.alpha is None else f"alpha = {least.alpha:.3g}"
        said = f"The smallest part of it that was tried ({where}) read {self._read(least.movement):.3g}"
        if least.feasible:
            return f"{said}, which is allowed, but in the dtype of the weights it is no step at all. {FINER}"
        if self._read(least.movement) <= (least.alpha or 0.0) * kl:  # most curves fall like alpha² near theta_t
            return (
                f"{said}: KL falls with alpha as it should, and is not yet small enough. Lower the learning rate "
                f"{slower}, raise the budget, or let the search go on (max_trials, min_alpha)"
            )
        start = "its movement at the weights before the step is 0 by definition"
        if self.still is not None:
            start = f"the KL function reads {self.still.largest:.3g} at the weights before the step"
        return (
            f"{said}, and {start}. Either the KL closure does not measure from the weights before the step (a function "
            "has to take its reference before every step), or its rounding is above the budget (raise that, or audit "
            "in float32), or the KL jumps near theta_t: then lower the learning rate"
        )


def _named(constraint: str) -> str:
    """A constraint in words."""
    if constraint == "not finite":
        return "an update or a KL that is not finite"
    if constraint == "drift":
        return "the cap on the drift from pi_ref"
    if constraint.startswith("drift:"):
        return f"the cap on the drift of slice {constraint.removeprefix('drift:')!r} from pi_ref"
    if constraint == "path":
        return "the cap on the path length"
    if constraint.startswith("path:"):
        return f"the cap on the path length of slice {constraint.removeprefix('path:')!r}"
    if constraint == "mean":
        return "the budget of the mean"
    if constraint in ("prompt", "token"):
        return f"the budget of the worst {constraint}"
    return f"the budget of slice {constraint.removeprefix('slice:')!r}"
