"""Runs of a study that never took place: a toy policy with the decisions, and the records, of the real controllers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from step_optim import Action, Movement, StepRecord
from step_optim.budget import Limits
from step_optim.telemetry.record import TrialRecord

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from study.config import ARMS, CONDITIONS, Batch, Study  # noqa: E402
from study.traces import Run  # noqa: E402

STUDY = replace(
    Study(),
    updates=16,
    shocks=(3, 7, 11, 14),
    budget_mean=0.03,
    budget_slices=0.05,
    tolerance_mean=0.02,
    tolerance_slices=0.04,
)
"""The toy's settings: not those of the study, which may change."""
PAPER = ("fixed", "gate", "breaker", "interpolate", "project", "ema", "ratchet_cap", "ratchet")
SLICES = ("story", "fact", "math", "code", "format", "harm")
UNSEEN = ("advice", "translate")
PLAN = (
    Batch("shocks", ("fixed", "interpolate"), tuple(range(9))),
    Batch("shocks", (*PAPER, "target_kl", "adaptive_kl", "gate_keep"), (0, 1, 2)),
    Batch("nominal", ("fixed",), (0, 1, 2)),
    Batch("low_lr", ("fixed",), (0, 1, 2)),
    Batch("double_lr", ("fixed",), (0, 1, 2)),
    Batch(
        "high_lr", ("fixed", "gate", "gate_keep", "gate_warm", "interpolate", "interpolate_warm", "project"), (0, 1, 2)
    ),
)


def whole_study() -> list[Run]:
    """Every run of `PLAN`."""
    runs = {(batch.arm, c, seed) for batch in PLAN for c in batch.conditions for seed in batch.seeds}
    return [run(*key) for key in sorted(runs)]


def run(arm: str, condition: str, seed: int, updates: int = STUDY.updates) -> Run:
    """One run of the toy."""
    toy = Toy(arm, condition, seed)
    steps = [toy.update(t) for t in range(updates)]
    return Run(arm, condition, seed, tuple(step[0] for step in steps), tuple(step[1] for step in steps), toy.result())


class Toy:
    """A policy that is a drift, a reward, and a memory of the rejections in a row."""

    def __init__(self, arm: str, condition: str, seed: int) -> None:
        self.arm, self.condition, self.seed = ARMS[arm], CONDITIONS[condition], seed
        self.name = condition
        self.drift, self.gain, self.in_a_row, self.held = 0.0, 0.0, 0, 0

    def update(self, t: int) -> tuple[StepRecord, dict[str, Any]]:
        """Propose, decide, move."""
        random = np.random.default_rng((self.seed, t))
        shock = self.arm.shocked and t in STUDY.shocks
        rate = self.arm.learning_rate * (STUDY.shock_factor if shock else 1.0) / 1.5e-3
        scale = 0.6 if self.condition.warm_start and t else 1.0
        rate *= scale * (0.75**self.in_a_row if self.name == "gate_keep" else 1.0)
        size = 0.012 * rate**1.4 * random.lognormal(0, 0.25) * self._habit(t)
        slices = dict(zip(SLICES, size * random.lognormal(0, 0.35, len(SLICES)), strict=True))
        slices["code"] *= 6.0 if t == 9 else 1.0  # which a breaker sees, and a global gate does not
        candidate = Movement(sum(slices.values()) / len(slices), slices)
        record = replace(self._decide(t, candidate, 5.0 * rate), scale=scale)
        elsewhere = random.lognormal(0.05, 0.12, len(SLICES) + len(UNSEEN))
        self._move(record.accepted.mean)
        update = {
            "t": t,
            "shock": shock,
            "held": self._held_out(record.accepted, elsewhere),
            "held_drift": 1.1 * self.drift,
            "seconds": 1.0 + sum(record.seconds.values()),
            "minibatches": 2 if self.name == "target_kl" and size > 0.03 else 4,
            "sampled_kl": size,
            "beta": 0.1 * (1.2**t if self.name == "adaptive_kl" else 1),
            "reference": self._reference(t),
        }
        return record, update

    def _habit(self, t: int) -> float:
        """What a baseline does of its own."""
        own = {"ema": 1.02, "ratchet": 1.15, "ratchet_cap": 1.15, "target_kl": 0.8, "adaptive_kl": 0.9}
        capped = self.name == "ratchet_cap" and self._reference(t) == "held"
        return own.get(self.name, 1.0) * (0.7 if capped else 1.0)

    def _reference(self, t: int) -> str:
        if self.condition.reference == "fixed":
            return "kept"
        return "held" if self.name == "ratchet_cap" and self.drift > 0.1 else "moved" if t % 2 else "kept"

    def _decide(self, t: int, candidate: Movement, norm: float) -> StepRecord:
        limits = Limits(
            STUDY.budget_mean if "mean" in self.condition.limits else math.inf,
            dict.fromkeys(SLICES, STUDY.budget_slices) if "slices" in self.condition.limits else {},
        )
        ratios = limits.judge(candidate).ratios
        common: dict[str, Any] = {
            "step": t,
            "candidate": candidate,
            "budget": limits,
            "update_norm": norm,
            "lr": (self.arm.learning_rate,),
            "reward": 0.5 + self.gain,
            "reference_drift": Movement(self.drift, dict.fromkeys(SLICES, self.drift)),
        }
        seconds = {"inner": 5.0, "snapshot": 0.01, "audit": 0.6, "search": 0.0}
        if all(used <= 1 for used in ratios.values()):
            self.in_a_row = 0
            return StepRecord(action=Action.COMMIT, accepted=candidate, alpha=1.0, seconds=seconds, **common)
        common |= {"triggered": True, "bound": max(ratios, key=lambda name: ratios[name])}
        if self.condition.controller == "Gate":
            self.in_a_row += 1
            return StepRecord(action=Action.REJECT, accepted=candidate.still(), alpha=0.0, seconds=seconds, **common)
        alpha = 0.995 / math.sqrt(max(ratios.values()))
        shrunk = scaled(candidate, alpha)
        seconds["search"] = 1.3
        beyond = TrialRecord(1.1 * alpha, scaled(candidate, 1.1 * alpha), False)
        common["trials"] = (beyond, TrialRecord(alpha, shrunk, True))
        if self.condition.controller == "Project":
            return self._project(candidate, alpha, seconds, common)
        return StepRecord(action=Action.SHRINK, accepted=shrunk, alpha=alpha, seconds=seconds, **common)

    def _project(
        self, candidate: Movement, alpha: float, seconds: dict[str, float], common: dict[str, Any]
    ) -> StepRecord:
        seconds["search"] = 11.0
        kept = {name: min(kl, 0.98 * STUDY.budget_slices) for name, kl in candidate.slices.items()}
        mean = sum(kept.values()) / len(kept)
        accepted = scaled(Movement(mean, kept), min(1.0, math.sqrt(0.98 * STUDY.budget_mean / mean)))
        residual = (1 - alpha) ** 2
        found = {
            "residual": 0.8 * residual,
            "residual_target": 0.1,
            "residual_interpolation": residual,
            "steps": 4.0,
        }
        return StepRecord(action=Action.PROJECT, accepted=accepted, projection=found, seconds=seconds, **common)

    def _move(self, kl: float) -> None:
        random = np.random.default_rng((self.seed, round(1e6 * self.drift)))
        self.drift += 0.9 * kl + 0.002 * math.sqrt(kl)
        self.gain += 0.06 * math.sqrt(kl) * (0.15 - kl) / 0.15 + 0.003 * random.standard_normal()

    def _held_out(self, moved: Movement, factors: np.ndarray) -> dict[str, Any]:
        kls = {name: kl * factor for (name, kl), factor in zip(moved.slices.items(), factors, strict=False)}
        kls |= dict(zip(UNSEEN, 1.2 * moved.mean * factors[len(SLICES) :], strict=True))
        return {"mean": sum(kls.values()) / len(kls), "slices": {name: float(kl) for name, kl in kls.items()}}

    def result(self) -> dict[str, Any]:
        """What the last policy is."""
        names = (*SLICES, *UNSEEN)
        return {
            "reward_before": 0.55,
            "reward": 0.55 + self.gain,
            "reward_slices_before": dict.fromkeys(names, 0.55),
            "reward_slices": dict.fromkeys(names, 0.55 + 0.9 * self.gain),
            "nll_before": 1.2,
            "nll": 1.2 + 0.5 * self.drift,
            "drift": {"mean": 1.1 * self.drift, "slices": dict.fromkeys(names, 1.3 * self.drift)},
            "control_drift": {"mean": self.drift, "slices": dict.fromkeys(SLICES, 1.1 * self.drift)},
            "seconds": 150.0,
            "device": "toy",
        }


def scaled(moved: Movement, alpha: float) -> Movement:
    """KL is a parabola in alpha."""
    return Movement(moved.mean * alpha**2, {name: kl * alpha**2 for name, kl in moved.slices.items()})


PARTS: Mapping[str, float] = {
    "accept": 1.0,
    "shrink": 0.5,
    "reject": 0.0,
    "reject_keep": 0.0,
    "project": 0.55,
    "shrink_restore": 0.5,
    "small": 0.4,
}


def branches(points: Iterable[tuple[int, int]] = ((0, 3), (0, 7), (1, 3), (1, 7), (2, 3))) -> list[dict[str, Any]]:
    """Branches of some points (seed, t)."""
    return [dict(branch) for seed, t in points for branch in _branches(seed, t)]


def _branches(seed: int, t: int) -> Iterator[dict[str, Any]]:
    random = np.random.default_rng((seed, t))
    candidate = 0.08 * random.lognormal(0, 0.2)
    at = 0.7 + 0.05 * random.standard_normal()
    for number, (name, part) in enumerate(PARTS.items()):
        noise = np.random.default_rng((seed, t, number)).standard_normal(3)
        kl = candidate * part**2
        yield {
            "seed": seed,
            "t": t,
            "branch": name,
            "control": {"mean": kl, "slices": dict.fromkeys(SLICES, 1.2 * kl)},
            "held": {"mean": 1.1 * kl, "slices": dict.fromkeys((*SLICES, *UNSEEN), 1.4 * kl)},
            "alpha": None if name in ("project", "small") else part,
            "projection": {"residual": 0.2, "residual_interpolation": 0.25} if name == "project" else {},
            "strength": [0.5] * len(SLICES) if name == "project" else [],
            "distance_control": 2.0 * (1 - part) ** 2,
            **({} if name == "small" else {"distance_held": 2.2 * (1 - part) ** 2}),
            "reward_at": at,
            "reward_now": at + 0.05 * part + 0.01 * noise[0],
            "reward_next": at + 0.03 + 0.04 * part + 0.015 * noise[1],
            "seconds": 0.5 + (11.0 if name == "project" else 0.0),
        }
