"""Searches on a line along which a drift does not start at 0: a parabola, of which theta_t knows one point already."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from step_optim import Budget, Interpolate, PolicyKL, Project, STEPOptimizer
from step_optim.budget import Limits, Verdict
from step_optim.controllers import Action
from step_optim.controllers.search import largest_feasible
from step_optim.movement import Movement

TOL, LEAST = 0.01, 1e-4


@dataclass
class Point:
    """An audited alpha."""

    ratios: dict[str, float]

    @property
    def feasible(self) -> bool:
        return all(ratio <= 1 for ratio in self.ratios.values())


def search(curves, at_zero, kind: str = "model") -> tuple[float, int]:
    """The alpha that was found (0 if none), and how many audits it took beyond the candidate's."""
    audits = 0

    def measure(alpha: float) -> Point:
        nonlocal audits
        audits += 1
        return Point({name: curve(alpha) for name, curve in curves.items()})

    found = largest_feasible(
        measure,
        Point({name: curve(1.0) for name, curve in curves.items()}),
        at_zero=at_zero,
        search=kind,
        tol=TOL,
        max_trials=24,
        min_alpha=LEAST,
    )
    return (0.0 if found is None else found[0]), audits


def largest(curves) -> float:
    """By brute force: convex curves that are feasible at 0."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        inside = all(curve(middle) <= 1 for curve in curves.values())
        low, high = (middle, high) if inside else (low, middle)
    return low


STARTS = st.one_of(st.floats(0.01, 0.99), st.floats(1, 6).map(lambda digits: 1 - 10**-digits))


@given(start=STARTS, size=st.floats(-1, 2), slope=st.floats(-1, 1))
def test_a_parabola_takes_two_audits(start, size, slope) -> None:
    """From any start, outwards or along the cap: the largest feasible alpha, within the tolerance."""
    bend = 10**size
    curve = lambda alpha: max(start + 2 * slope * math.sqrt(start * bend) * alpha + bend * alpha**2, 0.0)  # noqa: E731
    assume(curve(1.0) > 1)
    found, audits = search({"drift": curve}, {"drift": start})
    wanted = largest({"drift": curve})
    assert audits <= 2
    assert found <= wanted * (1 + 1e-9)
    assert found >= (1 - 2 * TOL) * wanted or wanted <= 2 * LEAST


@given(start=STARTS, size=st.floats(-1, 2), slope=st.floats(-1, 1), skew=st.floats(-0.2, 0.2), step=st.floats(0.1, 20))
def test_with_a_budget_on_the_step_beside_it(start, size, slope, skew, step) -> None:
    """A drift that is no parabola, and a K that starts at 0: never above either, in three audits nearly always."""
    bend = 10**size

    def drift(alpha: float) -> float:
        return max(start + 2 * slope * math.sqrt(start * bend) * alpha + bend * alpha**2 * (1 + skew * alpha), 0.0)

    curves = {"drift": drift, "mean": lambda alpha: step * alpha**2}
    assume(drift(1.0) > 1 or step > 1)
    found, audits = search(curves, {"drift": start, "mean": 0.0})
    assert all(curve(found) <= 1 + 1e-9 for curve in curves.values()) or found == 0
    assert audits <= 6
    assert found >= 0.9 * largest(curves) or largest(curves) <= 0.02


def test_how_many_on_average() -> None:
    """Over a grid of starts, bends and skews: bisection needs seven times as many."""
    counts: dict[str, list[int]] = {"model": [], "bisect": []}
    for start in (0.1, 0.5, 0.9, 0.97, 0.999):
        for bend in (0.5, 2.0, 8.0, 32.0):
            for slope in (-0.5, 0.0, 0.5):
                for skew in (-0.1, 0.0, 0.1):

                    def drift(alpha: float, start=start, bend=bend, slope=slope, skew=skew) -> float:
                        straight = 2 * slope * math.sqrt(start * bend) * alpha
                        return start + straight + bend * alpha**2 * (1 + skew * alpha)

                    if drift(1.0) > 1:
                        for kind, found in counts.items():
                            found.append(search({"drift": drift}, {"drift": start}, kind)[1])
    means = {kind: sum(found) / len(found) for kind, found in counts.items()}
    assert means["model"] <= 2.7
    assert sorted(counts["model"])[int(0.95 * len(counts["model"]))] <= 3
    assert means["bisect"] >= 3 * means["model"]


def test_on_the_cap_and_outwards_it_ends_at_once() -> None:
    """One small alpha fails, and the parabola says that a smaller one would."""
    found, audits = search({"drift": lambda alpha: 1 + alpha + alpha**2}, {"drift": 1.0})
    assert (found, audits) == (0.0, 1)


class World:
    """A policy that is pushed away from where it began."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3, dtype=torch.float64)
        self.inputs = torch.randn(6, 4, dtype=torch.float64)
        self.goal = torch.randint(0, 3, (6,))
        self.kl = PolicyKL(lambda: self.layer(self.inputs), {"a": [0, 1], "b": [2, 3, 4, 5]}, noise_floor=False)

    def step(self, optimizer: STEPOptimizer):
        optimizer.zero_grad()
        nn.functional.cross_entropy(self.layer(self.inputs), self.goal).backward()
        optimizer.step()
        return optimizer.last


@pytest.mark.parametrize("controller", [Interpolate(), Project(steps=1)])
@pytest.mark.parametrize("budget", [Budget(drift=0.01), Budget(drift_slices={"a": 0.01}), Budget(drift_slices=0.01)])
def test_caps_on_the_drift_and_on_that_of_slices(controller, budget) -> None:
    """Never exceeded, and a step takes few audits; the warning of steps in a row names the cap and `Steer`."""
    world = World()
    optimizer = STEPOptimizer(
        torch.optim.Adam(world.layer.parameters(), lr=0.05), kl=world.kl, budget=budget, controller=controller
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        records = [world.step(optimizer) for _ in range(20)]
    for record in records:
        limits = record.budget
        assert record.reference_drift.mean <= limits.drift
        assert all(record.reference_drift.slices[name] <= cap for name, cap in limits.drift_slices.items())
        if isinstance(controller, Interpolate):
            assert len(record.trials) <= 3
    if isinstance(controller, Interpolate):  # stuck
        assert any(record.action is Action.REJECT for record in records)
        assert any("cap on the drift" in str(w.message) and "Steer()" in str(w.message) for w in told)
    assert optimizer.last.bound.startswith("drift")
    assert optimizer.last.candidate_drift is not None


def test_limits_name_the_caps_that_were_exceeded_before() -> None:
    """Of these, less than now is asked, and the others stay."""
    limits = Limits(mean=1.0, drift=0.1, drift_slices={"a": 0.1, "b": 0.5})
    now = Movement(0.2, {"a": 0.05, "b": 0.6})
    assert limits.exceeded_by(now) == ("drift", "drift:b")
    assert limits.exceeded_by(None) == ()
    relaxed = limits.on_the_way_back(now)
    assert relaxed.drift_slices["a"] == 0.1
    assert not relaxed.judge(now.still(), now).feasible
    assert relaxed.judge(now.still(), Movement(0.199, {"a": 0.09, "b": 0.599})).feasible
    assert not relaxed.judge(now.still(), Movement(0.199, {"a": 0.11, "b": 0.599})).feasible
    assert limits.on_the_way_back(Movement(0.1, {"a": 0.1, "b": 0.5})) is limits


def test_drift_and_reference_are_two_names() -> None:
    """Of one cap, which is given once."""
    assert Budget(drift=0.05) == Budget(reference=0.05)
    assert Budget(reference=0.05).drift == Budget(drift=0.05).reference == 0.05
    with pytest.raises(TypeError, match="two names of one cap"):
        Budget(drift=0.05, reference=0.05)
    with pytest.raises(ValueError, match=r"budget\.drift_slices names the unknown slice 'x'"):
        Budget(drift_slices={"x": 0.1}).check_slices(["a"])
    with pytest.raises(ValueError, match=r"budget\.drift_slices=0\.1, but the control set has no slices"):
        Budget(drift_slices=0.1).check_slices([])
    with pytest.raises(ValueError, match=r"budget\.drift_slices\['a'\]"):
        Budget(drift_slices={"a": -1.0})
    assert Budget(drift_slices=lambda step: 0.1 / (1 + step)).at(1, ["a"]) == Limits(drift_slices={"a": 0.05})


def test_a_verdict_names_every_cap() -> None:
    """drift, and drift:<slice>; infinite ones are left out."""
    limits = Limits(drift=0.1, drift_slices={"a": 0.2, "b": math.inf})
    verdict = limits.judge(Movement(0.0), Movement(0.05, {"a": 0.3, "b": 9.0}))
    assert verdict == Verdict({"drift": 0.5, "drift:a": pytest.approx(1.5)})
