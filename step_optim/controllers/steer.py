"""Steer: lead the step back into the budgets along the gradients of what it violates."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step_optim.audit.closure import Draw
from step_optim.controllers.base import Controller, Outcome, Point, Trial, checked_on_reject, checked_on_shrink
from step_optim.controllers.bundle import Bundle, Cut, wide
from step_optim.controllers.pull import check_shares, next_shares
from step_optim.controllers.searches import ModelSearch

LEAST_PART = 1e-3
"""The smallest part of a step at which a model is measured."""

GROWTH = 4.0
"""Times the part of the last step with which the next one begins, 1 at most."""

LAST_PARTS = (1 / 16, 0.0)
"""Parts of a step that are tried last, at a cap."""

NEAR = 2.0
"""Times a budget up to which another correction is tried before less of the step is."""


@dataclass(frozen=True)
class Steer(Controller):
    """Commit the feasible point nearest to the candidate, as far as linear models of the constraints tell.

    A controller that only shortens steps cannot leave a cap on the drift: once
    the policy sits on it, every part of a step that leads outwards is beyond
    it, and learning ends. But from the candidate there is a short way back that
    keeps nearly all of what was learned: along the gradient of the violated
    constraint. (The projection of PCPO, Yang et al. 2020, after the optimizer's
    step, with an audit that decides.)

    For every violated constraint a linear model of sqrt(KL) is measured, by a
    backward pass over prompts drawn from the KL closure's pool; that of a cap
    is an average over the draws of many steps (see `bundle`). The point nearest
    to the candidate at which no model is above the aim is audited. If it is
    infeasible, a model is measured there; where that is not enough, less of the
    step is tried.

    A correction may move every parameter of the optimizer that the policy reads,
    also one that this step left alone.

    Where the KL closure has no gradients, the candidate's KL is not finite, or
    a budget is 0, the step is shrunk as `Interpolate` does it.

    Give the KL closure a pool: directions that are taken from the control set
    itself fit the control set, and drift elsewhere was 17 to 35 times the cap
    (examples/steering/counting.md).

    Raises:
        ValueError: an argument out of range, or an unknown option.

    >>> from step_optim import Budget, PolicyKL, STEPOptimizer
    >>> policy = torch.nn.Linear(2, 3, bias=False)
    >>> kl = PolicyKL(lambda: policy(torch.eye(2)), pool=lambda: policy(torch.ones(3, 2)))
    >>> optimizer = STEPOptimizer(
    ...     torch.optim.SGD(policy.parameters(), lr=1.0), kl=kl, budget=Budget(drift=0.01), controller=Steer()
    ... )
    >>> policy.weight.grad = torch.tensor([[1.0, 0.1], [0.0, 0.0], [0.0, 0.0]])
    >>> optimizer.step()
    >>> str(optimizer.last.action), optimizer.last.reference_drift.mean <= 0.01
    ('steer', True)
    """

    aim: float = 0.9
    """Part of each budget that a correction aims at: what is left lets the audit agree, and the next step begin."""

    corrections: int = 3
    """Gradients at most in one step; each costs a forward and backward over what is drawn."""

    trials: int = 8
    """Audits at most in one step besides the candidate's."""

    prompts: int | None = None
    """Prompts of the pool in one draw; by default as many as the control set has."""

    average: float = 0.85
    """How much of a cap's remembered direction is kept when another draw is measured; 0 takes every draw by itself."""

    far: float = 6.0
    """Where a candidate is beyond so many times a budget, a linear model is measured nearer to it."""

    on_reject: str = "restore"
    """``"restore"`` or ``"keep_state"``, if nothing that was tried is feasible."""

    on_shrink: str = "keep_state"
    """The optimizer state of what is committed; see `Interpolate`."""

    pull: bool = False
    """Whether caps pull before each inner step: a share of the gradient of their drift, on four prompts of the pool, is
    added to the loss's gradient for the inner step alone, so that proposals come out near the caps (see
    `controllers.pull`). The inner optimizer's moments then have seen both. Where a cap is near, it costs a forward over
    four prompts at every inner step (over all of the pool with `PolicyKL`, over the control set without a pool), and a
    backward for each cap."""

    follows_gradients = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not 0 < self.aim <= 1:
            raise ValueError(f"aim={self.aim} must lie between 0 and 1: the part of a budget that corrections aim at")
        if not self.far > 1:
            raise ValueError(f"far={self.far} must be above 1 budget; a candidate that needs no correction is feasible")
        for name in ("corrections", "trials", "prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 <= self.average < 1:
            raise ValueError(
                f"average={self.average} must be at least 0 and below 1: the part that is kept of the past"
            )
        checked_on_reject(self.on_reject)
        checked_on_shrink(self.on_shrink)

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse what are no linear models."""
        for plain in state.get("cuts", ()):
            Cut.of_plain(plain)
        int(state.get("turn", 0)), float(state.get("part", 1.0))
        check_shares(state.get("pull", {}))
        int(state.get("pulls", 0))

    def copied(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        """Copy the memory; the models, which are as large as the weights and are never written, are shared."""
        rest = {name: value for name, value in memory.items() if name != "cuts"}
        return super().copied(rest) | {name: list(memory[name]) for name in ("cuts",) if name in memory}

    def forget_reference(self, memory: dict[str, Any]) -> None:
        """Drop the models: they are of the drift from one pi_ref, over one list of parameters."""
        memory.pop("cuts", None)
        memory.pop("pull", None)

    def shares(self, memory: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the shares that the last candidates have led to."""
        shares: Mapping[str, float] = memory.get("pull", {})
        return shares

    def saw(self, ratios: Mapping[str, float], memory: dict[str, Any]) -> None:
        """Raise the shares of caps that the candidate is beyond, and lower the others."""
        if self.pull:
            memory["pull"] = next_shares(memory.get("pull", {}), ratios, self.aim)

    def decide(self, trial: Trial) -> Outcome:
        """Correct the candidate until the audit agrees; without gradients, shrink it."""
        measured = trial.candidate.movement.is_finite and all(map(math.isfinite, trial.candidate.ratios.values()))
        if measured and trial.kl.has_gradients:
            return _Steering(self, trial).outcome()
        found = ModelSearch(memory=False).find(trial)
        return trial.reject() if found is None else trial.accept(found)


class _Steering:
    """One decision."""

    def __init__(self, options: Steer, trial: Trial) -> None:
        self._options, self._trial = options, trial
        known = [Cut.of_plain(plain) for plain in trial.memory.get("cuts", ())]
        fitting = [cut.on(trial.weights.previous) for cut in known if cut.fits(trial.weights.previous)]
        self._bundle = Bundle(fitting, trial.inner)
        self._turn, self._corrections = int(trial.memory.get("turn", 0)), 0
        self._part = self._reached = 1.0
        """Which part of the step is tried; which one was, before the last resort."""
        self._multipliers: dict[str, float] = {}
        self._on_pool: dict[str, float] = {}
        """Constraints on the prompts that were drawn last."""

    def outcome(self) -> Outcome:
        """Decide; what was learned of the caps is for the next steps, too."""
        remembered = len(self._bundle.cuts)
        found = self._find()
        memory = self._trial.memory
        memory["turn"], memory["part"] = self._turn, max(self._reached, LEAST_PART)
        memory["cuts"] = [cut.to_plain() for cut in self._bundle.lasting]
        record = {"corrections": float(self._corrections), "remembered": float(remembered), "part": self._part}
        record |= {f"multiplier/{name}": value for name, value in self._multipliers.items()}
        record |= {f"pool/{name}": value for name, value in self._on_pool.items()}
        return self._trial.reject(steering=record) if found is None else self._trial.accept(found, steering=record)

    def _find(self) -> Point | None:
        options, trial = self._options, self._trial
        point, weights = trial.candidate, [wide(weight) for weight in trial.weights.candidate]
        self._bundle.learn(self._roots(point), weights)
        self._reached = self._part = float(min(1.0, GROWTH * trial.memory.get("part", 1.0)))
        violated = _violated(point)
        limits = {name: math.sqrt(trial.limits.of(name)) for name in violated}
        if not violated <= {cut.name for cut in self._bundle.above(limits, weights)}:  # nothing tells of one of them
            self._measure(violated, *self._nearer(point, weights))
        for _ in range(options.trials):
            point, weights = self._corrected()
            if point.feasible:
                return point
            near = max(point.ratios.values(), default=math.inf) <= NEAR and point.movement.is_finite
            if near and self._corrections < options.corrections:
                self._measure(_violated(point), point, weights)
            else:
                self._reached = self._part = 0.5 * self._part
        return self._last_resort()

    def _corrected(self) -> tuple[Point, list[Tensor]]:
        """Audit what is nearest to the part of the step that is tried."""
        names, budget = self._trial.previous.ratios, self._trial.budget
        aims = {name: math.sqrt(self._options.aim * budget.of(name)) for name in names}
        weights, self._multipliers = self._bundle.nearest(self._target(self._part), aims)
        point = self._trial.at_weights(weights)
        self._bundle.learn(self._roots(point), weights)
        return point, weights

    def _last_resort(self) -> Point | None:
        """Where corrections were not enough: shrink; or at a cap, go back to where the aim is, so that there is room.

        Directions come from the control set here, which judges: along them a small enough step is feasible.
        """
        trial, aim = self._trial, self._options.aim
        caps = {name: ratio * trial.limits.of(name) for name, ratio in trial.previous.ratios.items() if ratio > aim}
        if not caps:
            return ModelSearch(memory=False).find(trial)
        self._bundle.forget(caps)  # what is remembered of them has led astray
        self._add({name: math.sqrt(kl) for name, kl in caps.items()}, self._target(0.0), draw=None, lasts=False)
        for self._part in LAST_PARTS:
            point, _ = self._corrected()
            if point.feasible:
                return point
        return None

    def _nearer(self, point: Point, weights: list[Tensor]) -> tuple[Point, list[Tensor]]:
        """The candidate, or if it is far from the budgets a part of it that is not: there a linear model holds."""
        trial, far = self._trial, math.sqrt(self._options.far)
        parts = [1.0]
        for name, ratio in point.ratios.items():
            root, start = math.sqrt(ratio), math.sqrt(trial.previous.ratios.get(name, 0.0))
            if root > max(far, start):  # sqrt(KL) grows about linearly
                parts.append((far - start) / (root - start))
        part = trial.agree(max(min(parts), LEAST_PART))
        if part == 1.0:
            return point, weights
        weights = self._target(part)
        return trial.at_weights(weights), weights

    def _target(self, part: float) -> list[Tensor]:
        """A part of the step."""
        ends = zip(self._trial.weights.previous, self._trial.weights.candidate, strict=True)
        return [torch.lerp(wide(previous), wide(candidate), part) for previous, candidate in ends]

    def _measure(self, names: Collection[str], point: Point, weights: Sequence[Tensor]) -> None:
        """Add linear models of these constraints at a point; a draw from the pool tells their directions."""
        roots = {name: root for name, root in self._roots(point).items() if name in names and root > 0}
        if roots:
            count = self._options.prompts or len(point.movement.prompts or ()) or 1
            self._add(roots, weights, self._trial.draw(count, self._turn, list(roots)))
            self._turn += 1

    def _add(
        self, roots: Mapping[str, float], weights: Sequence[Tensor], draw: Draw | None, *, lasts: bool = True
    ) -> None:
        """Add models of these constraints: their direction is measured, sqrt(K) was audited.

        d sqrt(K) = sqrt(K) dv / 2v, with v the same constraint on the prompts that were drawn.
        """
        self._corrections += 1
        for (name, root), normal in zip(roots.items(), self._trial.normals(list(roots), weights, draw), strict=True):
            if draw is not None:
                self._on_pool[name] = normal.value
            if 0 < normal.value < math.inf:
                scale = root / (2 * normal.value)
                direction = [scale * wide(part) for part in normal.gradient]
                if name.startswith("drift") and lasts:
                    self._bundle.follow(name, direction, root, weights, self._options.average)
                else:
                    self._bundle.add(name, direction, root, weights)

    def _roots(self, point: Point) -> dict[str, float]:
        """sqrt(KL) of the constraints that were measured."""
        limits, ratios = self._trial.limits, point.ratios.items()
        return {name: math.sqrt(ratio * limits.of(name)) for name, ratio in ratios if 0 <= ratio < math.inf}


def _violated(point: Point) -> set[str]:
    """The constraints that do not hold."""
    return {name for name, ratio in point.ratios.items() if ratio > 1}
