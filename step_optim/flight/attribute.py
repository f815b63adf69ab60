"""Taking a kept step apart: the candidate is measured with one part after the other rolled back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from step_optim.controllers.base import Point
from step_optim.flight.attribution import Attribution, Part, figures
from step_optim.flight.kept import KeptStep
from step_optim.flight.parts import By, check_by, parts_of
from step_optim.flight.visit import Site, Visit
from step_optim.limits import Limits


def attributed(site: Site, kept: KeptStep | None, by: By | None, audits: int) -> Attribution:
    """Return which part of a kept step moved which slice; see `STEPOptimizer.attribute`."""
    if by is None:
        by = "group" if len(site.optimizer.param_groups) > 1 else "module"
    check_by(by)
    if isinstance(audits, bool) or not isinstance(audits, int):
        raise TypeError(f"audits={audits!r} is no whole number; give 16, say")
    if audits < 2:
        raise ValueError(f"audits={audits} must be at least 2: one part, and all others together")
    visit = Visit(site, kept)
    with torch.inference_mode(False), visit, visit:
        visit.begin()
        found = _Attributing(visit, site, by, audits).found()
        visit.end()
    return found


class _Attributing:
    """One attribution, while the visit lasts.

    Args:
        visit: is at the kept step.
        site: has the parameter groups.
        by: what the parts are.
        audits: of parts at most, and gradients at most.
    """

    def __init__(self, visit: Visit, site: Site, by: By, audits: int) -> None:
        self._visit, self._site, self._by, self._most = visit, site, by, audits
        self._parts: dict[str, list[int]] = site.ranks.agree(
            parts_of(by, visit.kept.names, site.optimizer, site.snapshot) if site.ranks.first else {}
        )
        self._candidate = visit.trial.candidate
        self._finite = self._candidate.movement.is_finite
        self._figures = self._of(self._candidate)
        self._gradients = 0

    def _of(self, point: Point) -> dict[str, float]:
        """What a point reads, by the names of the constraints: those of the step."""
        capped = self._visit.limits.caps_drift
        found = figures(point.movement, point.drift if capped else None, tails=True)
        limited = {name for name in ("prompt", "token") if self._visit.limits.of(name) < math.inf}
        return {name: kl for name, kl in found.items() if name not in ("prompt", "token") or name in limited}

    def found(self) -> Attribution:
        """Measure it."""
        constraint = self._constraint()
        first_order = self._first_order(constraint)
        parts = [self._measured(name, places, first_order) for name, places in self._chosen(first_order).items()]
        parts.sort(key=lambda part: self._remaining(part, constraint))
        return Attribution(
            self._visit.kept.step,
            self._by if isinstance(self._by, str) else "pattern" if isinstance(self._by, Mapping) else "function",
            constraint,
            self._candidate.movement,
            self._candidate.drift if self._visit.limits.caps_drift else None,
            tuple(parts),
            self._visit.audits,
            self._gradients,
            self._visit.kept.record.notes,
        )

    def _constraint(self) -> str:
        """What bound; where the candidate is not finite or nothing is limited, the mean."""
        bound = Limits.judged_as(self._visit.kept.record.bound or self._candidate.verdict.binding or "mean")
        return bound if bound in self._figures else "mean"

    @staticmethod
    def _remaining(part: Part, constraint: str) -> float:
        """What the candidate reads without a part: the less, the larger its effect; last what is not finite."""
        left = figures(part.without, part.without_drift, tails=True).get(constraint, math.nan)
        return math.inf if math.isnan(left) else left

    # -- first order --------------------------------------------------------------------------------------------------

    def _first_order(self, constraint: str) -> dict[str, list[float]]:
        """<grad K(candidate), delta> of each tensor, by constraint; one gradient is in memory at a time."""
        if not self._finite or not self._visit.trial.kl.has_gradients:
            return {}
        ratios = self._candidate.ratios
        names = sorted(self._figures, key=lambda name: (name != constraint, -ratios.get(name, 0.0), name != "mean"))
        return {name: self._products(name) for name in names[: self._most]}

    def _products(self, name: str) -> list[float]:
        self._gradients += 1
        with _requiring_grad(self._site.snapshot.parameters):
            (normal,) = self._visit.trial.normals([name], self._visit.candidate, None)
        ends = zip(normal.gradient, self._visit.previous, self._visit.candidate, strict=True)
        return [_product(*each) for each in ends]

    def _weight(self, places: Sequence[int], first_order: Mapping[str, Sequence[float]]) -> float:
        """What makes a part worth an audit of its own: |first order| / K, summed over constraints; or its share."""
        if not first_order:
            square = math.fsum(self._visit.squares[place] for place in places)
            return math.inf if math.isnan(square) else square
        known = [name for name in first_order if self._figures[name] > 0]
        return math.fsum(abs(math.fsum(first_order[n][p] for p in places)) / self._figures[n] for n in known)

    def _chosen(self, first_order: Mapping[str, Sequence[float]]) -> dict[str, list[int]]:
        """The parts that get an audit of their own, and the rest as one."""
        if len(self._parts) <= self._most:
            return self._parts
        ordered = sorted(self._parts, key=lambda name: -self._weight(self._parts[name], first_order))
        own, others = ordered[: self._most - 1], ordered[self._most - 1 :]
        rest = sorted(place for name in others for place in self._parts[name])
        return {name: self._parts[name] for name in own} | {f"the rest ({len(others)} parts)": rest}

    # -- one part -----------------------------------------------------------------------------------------------------

    def _measured(self, name: str, places: Sequence[int], first_order: Mapping[str, Sequence[float]]) -> Part:
        visit, rolled_back = self._visit, set(places)
        values = [
            previous if i in rolled_back else candidate
            for i, (previous, candidate) in enumerate(zip(visit.previous, visit.candidate, strict=True))
        ]
        point = visit.measured(values)
        without, total = self._of(point), math.fsum(visit.squares)
        return Part(
            name,
            len(places),
            math.fsum(visit.squares[place] for place in places) / total if total > 0 else 0.0,
            point.movement,
            point.drift if visit.limits.caps_drift else None,
            {c: kl - without.get(c, math.nan) for c, kl in self._figures.items()},
            {c: math.fsum(products[place] for place in places) for c, products in first_order.items()},
        )


@contextmanager
def _requiring_grad(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Have gradients of parameters that were frozen since the step, too."""
    frozen = [p for p in parameters if p.is_leaf and not p.requires_grad and (p.is_floating_point() or p.is_complex())]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _product(gradient: Tensor, previous: Tensor, candidate: Tensor) -> float:
    """Re <gradient, candidate - previous>, in float64; what did not move counts as 0, be it infinite."""
    wide: Any = torch.complex128 if candidate.is_complex() else torch.float64
    step = torch.where(candidate == previous, 0, candidate.to(wide) - previous.to(wide))
    return float(torch.vdot(step.flatten(), gradient.detach().to(wide).flatten()).real)
