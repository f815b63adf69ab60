"""What measures and judges the weights in one step, and knows again what it has measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from step_optim.audit.closure import Audit, Draw, KLClosure, Normal
from step_optim.budget import Budget
from step_optim.controllers.base import Ends, Point, Trial
from step_optim.controllers.bundle import wide
from step_optim.controllers.pull import PROMPTS
from step_optim.host.modules import named_parameters, outermost
from step_optim.host.ranks import Ranks
from step_optim.isolation.eval_mode import isolated
from step_optim.limits import Limits, Verdict
from step_optim.movement import Movement
from step_optim.path_length import PathLength
from step_optim.snapshot.path import Path
from step_optim.snapshot.rounding import Rounding
from step_optim.snapshot.snapshot import Snapshot
from step_optim.step.pulled import Pulled, norm
from step_optim.telemetry.record import TrialRecord


class Auditor:
    """Audits points, pools figures over processes, and holds them against the budgets.

    Args:
        kl: measures movement.
        budget: resolved at ``step``.
        path: how long it is before this step.
        step: the step index.
        snapshot: has the weights.
        ranks: who has to agree.
    """

    def __init__(
        self, kl: KLClosure, budget: Budget, path: PathLength, step: int, snapshot: Snapshot, ranks: Ranks
    ) -> None:
        self.kl, self._snapshot, self._ranks = kl, snapshot, ranks
        self._budget, self._path, self._step = budget, path, step
        self.limits = Limits()
        self.drift_before: Movement | None = None
        """Of theta_t from pi_ref; known if there is a cap."""
        self.audited: list[TrialRecord] = []
        """Every audit of this step, the candidate's first."""
        self._candidate: Point | None = None
        self._current: Point | None = None
        """The point whose weights are in place, as far as that is certain."""
        self._measured: WeakSet[Point] = WeakSet()  # the policies of discarded trials need not stay in memory
        self._known: WeakValueDictionary[tuple[int, ...], Point] = WeakValueDictionary()
        """Audited points by the digest of their weights, in every process."""
        self._infeasible: dict[tuple[int, ...], Point] = {}
        """Those that will not be committed, without their policies."""
        self._rounding: Rounding | None = None

    def resolve_budget(self, slices: Iterable[str]) -> None:
        """Find the limits of this step, for these slices."""
        self.limits = self._budget.at(self._step, slices).after(self._path)

    def audit(self, *, with_drift: bool = False) -> Audit:
        """Measure the current weights; the figures are those of all processes together.

        Args:
            with_drift: measure the drift in the same pass, if that is cheap.
        """
        kl = self.kl
        isolation = nullcontext() if kl.isolates else isolated(kl.modules())
        with self._snapshot.watch_groups(), isolation:
            with self._ranks.together():
                audit = kl.audit_with_drift() if with_drift or self.limits.caps_drift else kl.audit()
            return self._pooled(audit)

    def start_from(self, drift: Movement | None) -> None:
        """Take the drift of theta_t: of a cap that it exceeds, less than that is asked, and no more."""
        self.drift_before = drift

    @property
    def exceeded_before(self) -> tuple[str, ...]:
        """The caps that theta_t exceeds."""
        return self.limits.exceeded_by(self.drift_before)

    @property
    def _in_force(self) -> Limits:
        return self.limits.on_the_way_back(self.drift_before)

    def previous(self) -> Verdict:
        """Hold theta_t itself against the budgets: its movement is 0, its drift need not be."""
        return self._in_force.at_rest(self.drift_before if self.limits.caps_drift else None)

    def _pooled(self, audit: Audit) -> Audit:
        return replace(audit, movement=self._of_all(audit.movement))

    def _of_all(self, own: Movement) -> Movement:
        """A movement over the prompts of all processes; those that all of them have measured count once."""
        parts = self._ranks.exchange((own, self.kl.replica))
        first = parts[0][1]
        replicas = first is not None and all(replica == first for _, replica in parts)
        return Movement.pooled([moved for moved, _ in parts], replicas=replicas)

    def drift(self, audit: Audit | None = None) -> Movement | None:
        """Movement of an audited policy, or of the reference, from pi_ref; None if that is not measured."""
        drift = self.kl.drift(audit)
        return None if drift is None else self._of_all(drift)

    def candidate(self, audit: Audit) -> Point:
        """Judge the candidate, which is where the weights are."""
        if self.kl.slices is None:  # a plain function says what its slices are by measuring them
            self._budget.check_slices(audit.movement.slices)
            self.resolve_budget(audit.movement.slices)
        self._budget.check_measured(audit.movement)
        return self._judged(audit, alpha=1.0)

    def ratios(self, point: Point) -> Mapping[str, float]:
        """A point's figures against the budgets as they were set, also where a cap was exceeded before the step."""
        return self.limits.judge(point.movement, point.drift if self.limits.caps_drift else None).ratios

    def used_up(self, candidate: Point) -> list[str]:
        """The constraints that the candidate exceeds because a cap on the path has left nothing."""
        return [name for name in self.limits.used_up if candidate.ratios.get(name, 0.0) > 1]

    def not_finite(self) -> Point:
        """The candidate, where its update is not finite: infeasible without an audit."""
        return self._noted(
            Point(Audit(Movement.everywhere(math.nan, self.kl.slices or ())), Verdict({}, finite=False), alpha=1.0)
        )

    def _judged(self, audit: Audit, **where: Any) -> Point:
        caps = self.limits.caps_drift
        drift = self.drift(audit) if caps or audit.drift is not None else None
        verdict = self._in_force.judge(audit.movement, drift if caps else None)
        return self._noted(Point(audit, verdict, drift=drift, **where))

    def _noted(self, point: Point) -> Point:
        self.audited.append(TrialRecord(point.alpha, point.movement, point.feasible))
        return self._taken(point)

    def _taken(self, point: Point) -> Point:
        # A plain function may have written weights: what is committed are the weights that it was given.
        self._current = None if self.kl.opaque else point
        self._measured.add(point)
        return point

    def trial(self, candidate: Point, rejected: int, memory: dict[str, Any], explain: Callable[[], str]) -> Trial:
        """What a controller is given."""
        snapshot = self._snapshot
        snapshot.keep_candidate()
        self._candidate = candidate
        if self._current is None:
            snapshot.go(1)  # a plain function may have written into the weights
        bits = tuple(self._ranks.exchange(snapshot.digest()))
        self._known[bits], self._infeasible[bits] = candidate, candidate
        return Trial(
            candidate,
            self.previous(),
            self._in_force,
            self.limits,
            rejected,
            self.kl,
            Ends(snapshot),
            self._at,
            self._at_weights,
            self._distill,
            self._draw,
            self.normals,
            self.names,
            self._bend,
            self._inner,
            self._ranks.agree,
            memory,
            explain,
            self._realised if snapshot.is_coarse else None,
        )

    @property
    def rounded(self) -> bool:
        """Whether a search asked what rounding makes of smaller steps."""
        return self._rounding is not None

    def _realised(self, alphas: Sequence[float]) -> list[float]:
        """Which part of the update rounding leaves of each of these alphas, about."""
        if self._rounding is None:
            self._rounding = self._snapshot.rounding()
        return self._rounding.realised(alphas, self._ranks)

    def names(self) -> dict[str, int | None]:
        """Where the outermost modules' parameters are in the snapshot, by name; None of those that do not move."""
        return self._snapshot.names(named_parameters(outermost([*self.kl.modules(), *self.kl.used])))

    def _bend(self, weights: Sequence[float]) -> Callable[[float], Sequence[float]]:
        if len(self.audited) > 1:
            raise RuntimeError("bend() after other points were audited: those are on another way; call it first")
        squares = zip(*self._ranks.exchange(self._snapshot.squares()), strict=True)
        self._snapshot.bend(Path(weights, list(map(math.fsum, squares))))
        return self._snapshot.parts

    def _at(self, alpha: float) -> Point:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must lie between 0 (previous weights) and 1 (candidate)")
        self._snapshot.go(alpha)
        return self._audited_once(alpha=float(alpha))

    def _at_weights(self, values: Sequence[Tensor]) -> Point:
        values = self._write(values)
        return self._audited_once(weights=values)

    def _audited_once(self, **where: Any) -> Point:
        """Audit these weights, unless that was done in this step: rounding makes one point of many."""
        bits = tuple(self._ranks.exchange(self._snapshot.digest()))
        known = self._known.get(bits) or (self._infeasible.get(bits) if where.get("alpha") is not None else None)
        if known is None:
            point = self._judged(self.audit(), **where)
        else:
            point = self._taken(replace(known, again=True, **({"alpha": None, "weights": None} | where)))
        self._known[bits] = point
        if not point.feasible and point.alpha is not None:
            self._infeasible[bits] = replace(point, audit=replace(point.audit, policy=None))
        return point

    def _write(self, values: Sequence[Tensor]) -> list[Tensor]:
        values = [value.detach().clone() for value in values]
        self._snapshot.write(values)
        return values

    def _distill(self, values: Sequence[Tensor], strength: Tensor) -> tuple[Point, float, list[Tensor]]:
        values = self._write(values)
        kl: Any = self.kl
        assert self._candidate is not None
        audit, loss, gradients = kl.distill(self._candidate.audit, strength, self._snapshot.parameters)
        gradients = self._ranks.average(gradients, weight=kl.prompts)
        return self._judged(self._pooled(audit), weights=values), self._ranks.agree(loss), gradients

    def _draw(self, count: int, turn: int, names: Sequence[str]) -> Draw | None:
        self._snapshot.go(0)  # what a constraint on the step is measured from
        self._current = None
        with self._ranks.together():
            return self.kl.draw(count, turn, names)

    def normals(self, names: Sequence[str], values: Sequence[Tensor], draw: Draw | None = None) -> list[Normal]:
        """Values and gradients of constraints at any weights; see `Trial.normals`."""
        self._write(values)
        self._current = None
        with self._ranks.together():
            found = self.kl.gradients(names, self._snapshot.parameters, draw)
        return [self._pooled_normal(name, normal) for name, normal in zip(names, found, strict=True)]

    def pulled(self, shares: Mapping[str, float], turn: int) -> Pulled | None:
        """What caps add to the gradient at the current weights, each as long as its share; None if nothing."""
        caps = {f"drift:{name}": cap for name, cap in self.limits.drift_slices.items()} | {"drift": self.limits.drift}
        shares = {name: share for name, share in shares.items() if caps.get(name, math.inf) < math.inf}
        parameters = self._snapshot.parameters
        if not shares or not self.kl.has_gradients or not any(p.requires_grad for p in parameters):
            return None
        with self._ranks.together():
            draw = self.kl.draw(PROMPTS, turn, list(shares))
            found = self.kl.gradients(list(shares), parameters, draw)
        pulling, total = dict[str, float](), [wide(torch.zeros_like(weight)) for weight in self._snapshot.previous]
        read = [False] * len(total)
        for (name, share), normal in zip(shares.items(), found, strict=True):
            gradient = self._pooled_normal(name, normal).gradient
            squares = self._squares(gradient)
            length = math.sqrt(sum(squares))
            if 0 < length < math.inf:
                pulling[name] = share
                total = [n.add(wide(part), alpha=share / length) for n, part in zip(total, gradient, strict=True)]
                read = [before or square > 0 for before, square in zip(read, squares, strict=True)]
        direction = [(p, n) for p, n, reads in zip(parameters, total, read, strict=True) if reads]
        return Pulled(pulling, direction, self._norm) if pulling else None

    def _norm(self, gradients: Sequence[Tensor]) -> float:
        """L2 norm; over all processes where those have parts of the weights, and else without waiting for them."""
        return math.sqrt(sum(self._squares(gradients))) if self.kl.reduces_gradients else norm(gradients)

    def _squares(self, tensors: Sequence[Tensor]) -> list[float]:
        """The square of each tensor's length, over all processes."""
        own = [norm([tensor]) ** 2 for tensor in tensors]
        if not self.kl.reduces_gradients:
            return own
        return [math.fsum(parts) for parts in zip(*self._ranks.exchange(own), strict=True)]

    def _inner(self, pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[float]:
        found = self._snapshot.inner(pairs)
        every = self._ranks.exchange(found)
        return [sum(parts) / len(every) for parts in zip(*every, strict=True)]

    def _pooled_normal(self, name: str, normal: Normal) -> Normal:
        """The mean over the prompts of all processes; where all have the same, what each of them has measured."""
        weight = self._weight(name, normal)
        parts = self._ranks.exchange((normal.value, weight))
        value = sum(v * w for v, w in parts) / sum(w for _, w in parts)
        if self.kl.reduces_gradients:  # that is done; these are this process's shards
            return Normal(value, normal.gradient)
        return Normal(value, self._ranks.average(normal.gradient, weight))

    def _weight(self, name: str, normal: Normal) -> float:
        """What this process's normal counts in the mean over all prompts."""
        if name in ("prompt", "token"):  # the worst is in one of them
            return float(normal.value == max(self._ranks.exchange(normal.value)))
        return float(normal.count)

    def go(self, point: Point | None, *, restore_state: bool = False) -> None:
        """Leave a point in the weights.

        Args:
            point: one that was measured in this step, and is feasible.
            restore_state: with the optimizer state of theta_t.

        Raises:
            RuntimeError: any other point.
        """
        if point is None or point not in self._measured or not point.feasible:
            raise RuntimeError(
                f"the controller accepted {point}, which is not a feasible point that this trial measured"
            )
        if restore_state:  # copies of the weights are part of that state: they are moved along once more
            self._snapshot.restore_state()
        elif point is self._current:
            return
        if point.alpha is not None:
            self._snapshot.go(point.alpha)
        else:
            assert point.weights is not None
            self._snapshot.write(point.weights)

    def leave(self) -> None:
        """Leave the candidate for theta_t in the middle of a decision that ends in an error."""
        self._snapshot.go(0)
        self._current = None
