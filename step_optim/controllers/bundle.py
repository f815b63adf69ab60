"""A bundle of half-spaces that approximates a feasible set from outside, and the nearest point inside all of them.

With d the measured KL of one constraint, the root r = sqrt(d) is nearly a norm
of the movement, so nearly convex, and grows nearly linearly along any ray. Its
linear model at a point y,

    r(x) >= r(y) + <n, x - y>,   n the gradient of r at y,

is a half-space {x : r(y) + <n, x - y> <= sqrt(budget)} that cuts off what is
too far out (cutting planes: Kelley 1960; bundle methods: Lemarechal,
Nemirovskii and Nesterov 1995).

It stays valid as the policy moves along the boundary, so a cap's is remembered
from step to step. A normal n that was measured on a few prompts is noisy: what
is remembered is the average E <- a E + (1 - a) n, as long as n is along it,

    n <- E <n, E> / <E, E>,

so that the draw's noise makes the model no steeper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

SWEEPS = 400
"""Rounds of coordinate ascent on the dual; a bundle has a dozen half-spaces."""

AGREES = 0.3
"""Cosine of a normal and an average from which on it is trusted."""

RIDGE = 1e-7
"""Added to the diagonal of the Gram matrix, relative to it: two normals may be the same."""


@dataclass(frozen=True)
class Cut:
    """A linear model of one constraint's root: offset + <normal, x>."""

    name: str
    """The constraint."""
    normal: Sequence[Tensor]
    """A tensor for each parameter."""
    offset: float
    """So that the model is exact where it was measured."""
    lasting: bool = False
    """Whether it is remembered when the step has ended."""

    def fits(self, weights: Sequence[Tensor]) -> bool:
        """Whether the normal is one of such weights: a parameter may have been added since."""
        return len(self.normal) == len(weights) and all(
            n.shape == w.shape for n, w in zip(self.normal, weights, strict=True)
        )

    def on(self, weights: Sequence[Tensor]) -> Cut:
        """The same on the devices of these weights: a checkpoint may have been read to the CPU."""
        if all(n.device == w.device for n, w in zip(self.normal, weights, strict=True)):
            return self
        return replace(self, normal=[n.to(w.device) for n, w in zip(self.normal, weights, strict=True)])

    def to_plain(self) -> dict[str, Any]:
        """As a checkpoint has it."""
        return {"name": self.name, "normal": list(self.normal), "offset": self.offset}

    @staticmethod
    def of_plain(plain: Mapping[str, Any]) -> Cut:
        """Read what `to_plain` returned.

        Raises:
            Exception: of any kind, if it is none.
        """
        normal, offset = [*plain["normal"]], float(plain["offset"])
        if not math.isfinite(offset) or not all(isinstance(part, Tensor) for part in normal):
            raise ValueError(f"{plain['name']!r}: no linear model of a constraint")
        return Cut(str(plain["name"]), normal, offset, lasting=True)


Inner: TypeAlias = "Callable[[Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]], list[float]]"
"""<a, b> of pairs of points; over all processes, where these have parts of the weights."""


class Bundle:
    """The linear models that are known.

    Args:
        cuts: those that are remembered, the oldest first.
        inner: computes inner products.
    """

    def __init__(self, cuts: Sequence[Cut], inner: Inner) -> None:
        self.cuts, self._inner = list(cuts), inner

    def add(self, name: str, normal: Sequence[Tensor], root: float, weights: Sequence[Tensor]) -> None:
        """Add the model that is exact at these weights, where its constraint's root was measured.

        A normal that is 0, or not finite, tells nothing and is left out.
        """
        along, square = self._inner([(normal, weights), (normal, normal)])
        if math.isfinite(along) and 0 < square < math.inf:
            self.cuts.append(Cut(name, normal, root - along))

    def follow(
        self, name: str, normal: Sequence[Tensor], root: float, weights: Sequence[Tensor], average: float
    ) -> None:
        """The same, by an average of normals, which takes the place of what is remembered of the constraint.

        Args:
            name: the constraint.
            normal: the newest.
            root: of the constraint, at these weights.
            weights: where both were measured.
            average: how much of what is remembered is kept, 0 to 1.
        """
        for old in (cut.normal for cut in self.cuts if cut.lasting and cut.name == name):
            normal = self._averaged(old, normal, average)
        known = len(self.cuts)
        self.add(name, normal, root, weights)
        if len(self.cuts) > known:
            new = replace(self.cuts.pop(), lasting=True)
            self.cuts = [cut for cut in self.cuts if not (cut.lasting and cut.name == name)] + [new]

    def _averaged(self, old: Sequence[Tensor], new: Sequence[Tensor], average: float) -> list[Tensor]:
        """The average of two normals, as long as the newer one is along it.

        Where they point apart, with less of the old one, or nothing: it is of another place then.
        """
        for part in (average, average / 2, average / 4):
            mean = [part * o.to(n.dtype) + (1 - part) * n for o, n in zip(old, new, strict=True)]
            along, square, length = self._inner([(new, mean), (mean, mean), (new, new)])
            if along > AGREES * math.sqrt(square * length) and 0 < square < math.inf:
                return [along / square * m for m in mean]
        return list(new)

    def learn(self, roots: Mapping[str, float], weights: Sequence[Tensor]) -> None:
        """Lower the models that are above what was measured at some weights: a convex function is above all of them."""
        values = self._at(weights)
        self.cuts = [
            replace(cut, offset=cut.offset - max(0.0, value - roots.get(cut.name, math.inf)))
            for cut, value in zip(self.cuts, values, strict=True)
        ]

    def above(self, roots: Mapping[str, float], weights: Sequence[Tensor]) -> list[Cut]:
        """The models that predict more at some weights than these roots of their constraints."""
        values = zip(self.cuts, self._at(weights), strict=True)
        return [cut for cut, value in values if value > roots.get(cut.name, math.inf)]

    def forget(self, names: Collection[str]) -> None:
        """Drop the models of some constraints."""
        self.cuts = [cut for cut in self.cuts if cut.name not in names]

    @property
    def lasting(self) -> list[Cut]:
        """What is remembered when the step has ended."""
        return [cut for cut in self.cuts if cut.lasting]

    def nearest(self, weights: Sequence[Tensor], aims: Mapping[str, float]) -> tuple[list[Tensor], dict[str, float]]:
        """Return the point nearest to some weights at which no model is above its constraint's aim.

        min ‖x - weights‖² subject to offset_i + <n_i, x> <= aim_i. The dual is a
        quadratic problem in as many unknowns as there are models, min ½ m' G m
        - v' m over m >= 0, with G the normals' Gram matrix and v by how much
        each model is above the aim; x = weights - sum_i m_i n_i.

        Args:
            weights: what to be near to.
            aims: for sqrt(KL), by constraint; models of others are left out.

        Returns:
            x, and the sum of the multipliers m of each constraint.
        """
        cuts = [cut for cut in self.cuts if aims.get(cut.name, math.inf) < math.inf]
        normals = [cut.normal for cut in cuts]
        gram = self._inner([(a, b) for a in normals for b in normals])
        size = len(normals)
        rows = [gram[i * size : (i + 1) * size] for i in range(size)]
        found = solve(rows, [v - aims[cut.name] for cut, v in zip(cuts, self._at(weights, cuts), strict=True)])
        moved, multipliers = [wide(weight) for weight in weights], dict[str, float]()
        for cut, multiplier in zip(cuts, found, strict=True):
            if multiplier > 0:
                moved = [x - multiplier * n.to(x.dtype) for x, n in zip(moved, cut.normal, strict=True)]
                multipliers[cut.name] = multipliers.get(cut.name, 0.0) + multiplier
        return moved, multipliers

    def _at(self, weights: Sequence[Tensor], cuts: Sequence[Cut] | None = None) -> list[float]:
        """What models predict at some weights; all of them by default."""
        chosen = self.cuts if cuts is None else cuts
        products = self._inner([(cut.normal, weights) for cut in chosen])
        return [cut.offset + product for cut, product in zip(chosen, products, strict=True)]


def solve(rows: Sequence[Sequence[float]], excess: Sequence[float]) -> list[float]:
    """Minimise ½ m' G m - v' m over m >= 0 by coordinate descent.

    Args:
        rows: of the Gram matrix G.
        excess: v.
    """
    size = len(rows)
    found = [0.0] * size
    for _ in range(SWEEPS):
        change = 0.0
        for i in range(size):
            diagonal = rows[i][i] * (1 + RIDGE)
            if not diagonal > 0:
                continue
            rest = excess[i] - sum(rows[i][j] * found[j] for j in range(size) if j != i)
            new = max(0.0, rest / diagonal)
            change = max(change, abs(new - found[i]) * math.sqrt(diagonal))
            found[i] = new
        if change <= 1e-10 * max([abs(value) for value in excess], default=0.0):
            break
    return found


def inner(pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[float]:
    """<a, b> of each pair, over all tensors, summed in float64."""
    return [sum(float(torch.dot(_flat(x), _flat(y))) for x, y in zip(a, b, strict=True)) for a, b in pairs]


def _flat(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().flatten().double()


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
