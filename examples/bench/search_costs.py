"""Section "search": audits that an infeasible candidate takes, over real candidate steps and budgets.

A candidate is audited wherever any search asks, once; so all searches see the same curve K(alpha), and its largest
feasible alpha is known better than any of them is asked to find it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from bench import Bench, interpolate
from progress import Progress
from torch import Tensor
from workload import Workload

from step_optim import Interpolate, Movement
from step_optim.audit.closure import Audit
from step_optim.budget import Limits
from step_optim.controllers.base import Point, Trial

SEARCHES = {
    "model": {},
    "model, without memory": {"memory": False},
    "model, strict": {"strict": True},
    "bisect": {"search": "bisect"},
    "backtrack (tol=0.5)": {"search": "backtrack", "tol": 0.5},
}
"""Options of `Interpolate`; all at tol=0.01 but the last, which is plain backtracking."""

DEFAULT = "model"
"""What `Interpolate()` does. In versions that have a memory, it has it."""

RATES = (0.5, 1.0, 3.0)
"""Learning rates, of that at which a candidate moves 0.05 nats."""

BUDGETS = (0.5, 0.1, 0.02)
"""Budgets, of what the candidate moves."""

PROMPTS = 8
"""Of the control set: the shape of K(alpha) is a matter of the weights, and there are hundreds of audits."""

COMMITTED = 0.1
"""The budget at which the run goes on."""

WITHIN = 0.01
REFINED = 0.001
"""How closely the largest feasible alpha is known at the end."""


class Curve:
    """K(alpha) of one candidate, audited where somebody asks."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._weights = [p for group in bench.inner.param_groups for p in group["params"]]
        self._before = self._copy()
        bench.kl.anchor()
        bench.inner.step()
        self._candidate = self._copy()
        self.known: dict[float, Movement] = {1.0: bench.kl()}

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self._weights]

    @torch.no_grad()
    def write(self, alpha: float) -> None:
        """Put the weights there."""
        for p, old, new in zip(self._weights, self._before, self._candidate, strict=True):
            p.copy_(torch.lerp(old, new, alpha))

    def at(self, alpha: float) -> Movement:
        """Audit there, unless that has been done."""
        if alpha not in self.known:
            self.write(alpha)
            self.known[alpha] = self._bench.kl()
        return self.known[alpha]

    def limits(self, part: float) -> Limits:
        """Budgets for the mean and every slice, as a part of what the candidate moves."""
        whole = self.known[1.0]
        return Limits(part * whole.mean, dict.fromkeys(whole.slices, part * whole.worst[1]))

    def best(self, limits: Limits) -> float:
        """The largest feasible alpha, from all that was audited and a few audits more."""
        low = max((a for a, moved in self.known.items() if limits.judge(moved).feasible), default=0.0)
        high = min((a for a, moved in self.known.items() if a > low), default=1.0)
        while high - low > REFINED * high:
            middle = (low + high) / 2
            low, high = (middle, high) if limits.judge(self.at(middle)).feasible else (low, middle)
        return low


def trial_over(curve: Curve, limits: Limits, asked: list[float], memory: dict[str, Any]) -> Trial:
    """What a controller sees; ``asked`` collects the alphas that it has audited, ``memory`` what it remembers."""

    def point(alpha: float) -> Point:
        moved = curve.at(alpha)
        return Point(Audit(moved), limits.judge(moved), alpha)

    def at(alpha: float) -> Point:
        asked.append(alpha)
        return point(alpha)

    def refuse(*_: Any) -> Any:
        raise NotImplementedError("a search along the line only")

    given: dict[str, Any] = dict.fromkeys(
        ("at_weights", "distill", "draw", "normals", "inner", "names", "bend"), refuse
    )
    given |= {"kl": None, "weights": None, "rejected_in_a_row": 0}
    return Trial(
        candidate=point(1.0), previous=point(0.0).verdict, limits=limits, budget=limits, at=at, memory=memory, **given
    )


def measure_searches(workload: Workload, steps: int, progress: Progress) -> dict[str, Any]:
    """Consecutive training steps at several learning rates; every search at every budget."""
    bench = Bench(workload.model("lora"), workload.batch(), workload.control(PROMPTS))
    bench.calibrate()
    rate = bench.inner.param_groups[0]["lr"]
    problems: list[dict[str, Any]] = []
    for factor in RATES:
        what = f"search: {steps} candidates at {factor:g} times the learning rate"
        if factor != RATES[0] and not progress.allows(what):
            continue
        bench.start.put_back()
        bench.inner.param_groups[0]["lr"] = factor * rate
        problems += _run(bench, workload, steps, progress)
        progress.say(f"searches: {len(problems)} problems so far")
    return {"tol": WITHIN, "problems": problems, "searches": _totals(problems), "default": DEFAULT}


def _run(bench: Bench, workload: Workload, steps: int, progress: Progress) -> list[dict[str, Any]]:
    """Some steps in a row; each controller has a memory that goes from one to the next."""
    controllers: dict[tuple[float, str], tuple[Interpolate, dict[str, Any]]] = {
        (part, name): (made, {})
        for part in BUDGETS
        for name, options in SEARCHES.items()
        if (made := interpolate(**options)) is not None
    }
    problems = []
    for step in range(steps):
        bench.ids = workload.batch(seed=step)
        bench.backward()
        curve = Curve(bench)
        for part in BUDGETS:
            problems.append(_solve(curve, part, {name: c for (p, name), c in controllers.items() if p == part}))
        moved, rate = curve.known[1.0].mean, bench.inner.param_groups[0]["lr"]
        progress.say(f"search: candidate {step + 1} of {steps} at lr {rate:.2g} moves {moved:.3g} nats")
        curve.write(problems[BUDGETS.index(COMMITTED) - len(BUDGETS)]["best"])
    return problems


def _solve(curve: Curve, part: float, controllers: dict[str, tuple[Interpolate, dict[str, Any]]]) -> dict[str, Any]:
    """Let every search find its alpha for one candidate and one budget."""
    limits = curve.limits(part)
    found = {}
    for name, (controller, memory) in controllers.items():
        asked: list[float] = []
        point = controller.line.find(trial_over(curve, limits, asked, memory))
        found[name] = {"audits": len(asked), "alpha": 0.0 if point is None else point.alpha}
    return {"kl": curve.known[1.0].mean, "part": part, "best": curve.best(limits), "found": found}


def _totals(problems: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By search: audits, and how often alpha was within 1 % of the largest feasible one."""
    totals = {}
    for name in problems[0]["found"]:
        audits = sorted(problem["found"][name]["audits"] for problem in problems)
        near = [problem["found"][name]["alpha"] >= (1 - WITHIN) * problem["best"] for problem in problems]
        totals[name] = {
            "mean": statistics.mean(audits),
            "p90": audits[int(0.9 * (len(audits) - 1))],
            "max": audits[-1],
            "within": sum(near) / len(near),
        }
    return totals
