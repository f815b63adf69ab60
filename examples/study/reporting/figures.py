"""The figures of one run: the composite metric on held-out prompts, its components, and what the controller did.

M = ΔR · S_stability · S_worst. ΔR is what held-out reward gained; S_stability is the mean over accepted updates of
min(1, tau_g / K_global), S_worst that of min(1, tau_s / max_s K_s), both on held-out prompts, with tolerances that are
no budget. Where ΔR <= 0, M = ΔR: a product would make a loss smaller by instability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, median
from typing import Any

from step_optim import Action, Movement, StepRecord
from step_optim.budget import Limits
from study.config import Study
from study.traces import Run

OWN_PHASES = ("snapshot", "audit", "search")
"""What STEP spends, by its own clock; the inner step is the host's."""


@dataclass(frozen=True)
class Figures:
    """One run in numbers. KL in nats per token; None where a figure is not defined."""

    score: float
    """M, the composite metric"""
    gain: float
    """ΔR: held-out reward of the last policy, minus that of the first"""
    stability: float
    """S_stability in [0, 1]; 1 if no update was accepted"""
    worst_stability: float
    """S_worst in [0, 1]; likewise"""
    reward: float
    """held-out reward of the last policy"""
    reward_before: float
    """of the first"""
    unseen_gain: float | None
    """ΔR over the slices of which no prompt was trained on or audited"""

    updates: int
    accepted: int
    """updates that committed something"""
    control_mean: float
    """K_global of accepted updates on the control set, mean"""
    control_max: float
    control_worst_max: float
    """largest K_s of any accepted update"""
    held_mean: float
    """the same three on held-out prompts"""
    held_max: float
    held_worst_max: float
    ratio_mean: float | None
    """held-out over control, on the slices that both have: sums of K_global over accepted updates"""
    ratio_worst: float | None
    """the same of the worst slices"""
    ratio_unseen: float | None
    """unseen slices (held-out) over K_global on the control set"""

    drift: float
    """of the last policy from the first, held-out"""
    control_drift: float
    nll_change: float
    """of base text [nats per token]"""

    trigger_rate: float
    rejection_rate: float
    shrink_rate: float
    project_rate: float
    rejected: int
    """updates lost to rejection"""
    longest_rejection: int
    """most rejections in a row"""
    alphas: tuple[float, ...]
    """part of the update that was committed, at each trigger; 0 after a rejection; nothing off the line"""
    mean_alpha: float | None
    residual: float | None
    """mean ‖l - l_candidate‖² of what was committed, mean over the projections of the run"""
    residual_ratio: float | None
    """the same over that of the best interpolation: sums"""
    precision: float | None
    """part of the triggers that known shocks caused; None without budgets, shocks or triggers"""
    recall: float | None
    """part of the known shocks that triggered; None without budgets or shocks"""
    over_budget: int
    """accepted updates beyond the study's budgets (global, or any slice) on the control set, whoever has a budget"""
    over_own: int
    """accepted updates beyond the budgets that were in force, on the control set"""
    over_own_held: int
    """the same on the held-out prompts of the slices that the control set has"""

    overhead_seconds: float
    """snapshots, audits and searches; a run without budgets still audits"""
    overhead_updates: float | None
    """the same per update, in units of the run's median bare update"""
    audits_per_step: float
    seconds: float
    """of all updates, without scoring and held-out audits"""
    reward_per_length: float | None
    """ΔR over the length of the path: the sum of √K_global over accepted updates, on the control set. K grows like the
    square of a step, so that ΔR / K would favour short steps whatever they teach"""


def figures(run: Run, study: Study) -> Figures:
    """Compute all figures of a run.

    Args:
        run: a finished run with at least one update.
        study: its tolerances and budgets.

    Raises:
        ValueError: no updates, or not as many step records as updates.
    """
    if not run.records or len(run.records) != len(run.updates):
        raise ValueError(
            f"run {run.name} has {len(run.records)} step records and {len(run.updates)} updates; a finished run has "
            "one of each per update, and at least one"
        )
    gain = run.result["reward"] - run.result["reward_before"]
    held = [update["held"] for update in accepted_updates(run)]
    stability = share_within([moved["mean"] for moved in held], study.tolerance_mean)
    worst_stability = share_within([worst(moved) for moved in held], study.tolerance_slices)
    return Figures(
        score=composite(gain, stability, worst_stability),
        gain=gain,
        stability=stability,
        worst_stability=worst_stability,
        **_outcome(run),
        **_movement(run, held, gain),
        **_decisions(run),
        **_beyond(run, study),
        **_costs(run),
    )


def composite(gain: float, stability: float, worst_stability: float) -> float:
    """Return M.

    >>> composite(0.5, 0.8, 0.5), composite(-0.5, 0.8, 0.5)
    (0.2, -0.5)
    """
    return gain * stability * worst_stability if gain > 0 else gain


def share_within(kls: Sequence[float], tolerance: float) -> float:
    """Return the mean of min(1, tolerance / KL); 1 without any. A KL that is not finite is within no tolerance.

    >>> share_within([0.01, 0.04], tolerance=0.02), share_within([0.01, math.nan], tolerance=0.02)
    (0.75, 0.5)
    """
    shares = [0.0 if not math.isfinite(kl) else min(1.0, tolerance / kl) if kl > 0 else 1.0 for kl in kls]
    return fmean(shares) if shares else 1.0


def worst(movement: Mapping[str, Any]) -> float:
    """KL of the slice that moved most; of all prompts if there are no slices."""
    return largest([*movement["slices"].values()] or [movement["mean"]])


def largest(kls: Sequence[float]) -> float:
    """Return the largest KL, NaN if there is one; 0 without any.

    >>> largest([0.1, math.nan, 0.2]), largest([0.1, 0.2]), largest([])
    (nan, 0.2, 0.0)
    """
    return max(kls, key=lambda kl: (math.isnan(kl), kl), default=0.0)


def is_accepted(record: StepRecord) -> bool:
    """Whether the update moved the policy."""
    return record.action not in (Action.REJECT, Action.UNCHANGED)


def accepted_records(run: Run) -> list[StepRecord]:
    """The records of the updates that moved the policy."""
    return [record for record in run.records if is_accepted(record)]


def accepted_updates(run: Run) -> list[Mapping[str, Any]]:
    """What else is known of them."""
    return [update for record, update in zip(run.records, run.updates, strict=True) if is_accepted(record)]


def unseen_slices(run: Run) -> list[str]:
    """Held-out slices that the control set does not have."""
    audited = {name for record in run.records for name in record.candidate.slices}
    return [name for name in run.result["reward_slices"] if name not in audited] if audited else []


def shared(moved: Mapping[str, Any], control: Movement) -> Movement:
    """A held-out movement over the slices that the control set has too: like with like.

    >>> shared({"mean": 3.0, "slices": {"math": 1.0, "advice": 5.0}}, Movement(2.0, {"math": 2.0}))
    Movement(mean=1.0, slices={'math': 1.0})
    """
    slices = {name: moved["slices"][name] for name in control.slices if name in moved["slices"]}
    return Movement(fmean(slices.values()), slices) if slices else Movement(moved["mean"])


def path_length(run: Run) -> float:
    """Sum of √K_global over the accepted updates, on the control set: √K is to first order a step's length."""
    return sum(math.sqrt(record.accepted.mean) for record in accepted_records(run))


def rejections(records: Sequence[StepRecord]) -> list[list[StepRecord]]:
    """Return the rejected updates, those in a row together."""
    runs = groupby(records, key=lambda record: record.action is Action.REJECT)
    return [list(group) for rejected, group in runs if rejected]


def over_budget(movement: Mapping[str, Any], study: Study) -> bool:
    """Whether a movement is beyond the study's global budget, or beyond that of a slice."""
    return bool(movement["mean"] > study.budget_mean or worst(movement) > study.budget_slices)


def ratio(above: float, below: float) -> float | None:
    """Divide; None by zero."""
    return above / below if below else None


def mean(values: Sequence[float]) -> float | None:
    """Average; None without any."""
    return fmean(values) if values else None


def _outcome(run: Run) -> dict[str, Any]:
    result, unseen = run.result, unseen_slices(run)
    return {
        "reward": result["reward"],
        "reward_before": result["reward_before"],
        "unseen_gain": mean([result["reward_slices"][s] - result["reward_slices_before"][s] for s in unseen]),
        "drift": result["drift"]["mean"],
        "control_drift": result["control_drift"]["mean"],
        "nll_change": result["nll"] - result["nll_before"],
        "seconds": result["seconds"],
    }


def _movement(run: Run, held: Sequence[Mapping[str, Any]], gain: float) -> dict[str, Any]:
    control = [record.accepted for record in accepted_records(run)]
    control_means, control_worst = [moved.mean for moved in control], [moved.worst[1] for moved in control]
    held_means, held_worst = [moved["mean"] for moved in held], [worst(moved) for moved in held]
    alike = [shared(there, here) for there, here in zip(held, control, strict=True)]
    unseen = unseen_slices(run)
    elsewhere = [fmean(moved["slices"][name] for name in unseen) for moved in held] if unseen else []
    return {
        "updates": len(run.records),
        "accepted": len(control),
        "control_mean": mean(control_means) or 0.0,
        "control_max": largest(control_means),
        "control_worst_max": largest(control_worst),
        "held_mean": mean(held_means) or 0.0,
        "held_max": largest(held_means),
        "held_worst_max": largest(held_worst),
        "ratio_mean": ratio(sum(moved.mean for moved in alike), sum(control_means)),
        "ratio_worst": ratio(sum(moved.worst[1] for moved in alike), sum(control_worst)),
        "ratio_unseen": ratio(sum(elsewhere), sum(control_means)) if elsewhere else None,
        "reward_per_length": ratio(gain, path_length(run)),
    }


def _decisions(run: Run) -> dict[str, Any]:
    records = run.records
    triggered = [record for record in records if record.triggered]
    alphas = tuple(record.alpha for record in triggered if record.alpha is not None)
    share = {action: sum(record.action is action for record in records) / len(records) for action in Action}
    in_a_row = [len(group) for group in rejections(records)]
    return {
        "trigger_rate": len(triggered) / len(records),
        "rejection_rate": share[Action.REJECT],
        "shrink_rate": share[Action.SHRINK],
        "project_rate": share[Action.PROJECT],
        "rejected": sum(in_a_row),
        "longest_rejection": max(in_a_row, default=0),
        "alphas": alphas,
        "mean_alpha": mean(alphas),
        **_residuals(records),
        **_detection(run),
    }


def _residuals(records: Sequence[StepRecord]) -> dict[str, float | None]:
    """How near the projections came to their candidates, and how near interpolation would have come."""
    pairs = [
        (found["residual"], found["residual_interpolation"])
        for found in (record.projection for record in records)
        if found and all(math.isfinite(found.get(name, math.nan)) for name in ("residual", "residual_interpolation"))
    ]
    committed, interpolated = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return {"residual": mean(committed), "residual_ratio": ratio(sum(committed), sum(interpolated))}


def is_limited(run: Run) -> bool:
    """Whether any budget of a run is finite."""
    limits = [record.budget for record in run.records]
    return any(limit.limits_anything for limit in limits)


def _detection(run: Run) -> dict[str, float | None]:
    shocked = [bool(update["shock"]) for update in run.updates]
    if not any(shocked) or not is_limited(run):
        return {"precision": None, "recall": None}
    triggered = [record.triggered for record in run.records]
    hits = sum(shock and trigger for shock, trigger in zip(shocked, triggered, strict=True))
    return {"precision": ratio(hits, sum(triggered)), "recall": ratio(hits, sum(shocked))}


def _beyond(run: Run, study: Study) -> dict[str, int]:
    records, updates = accepted_records(run), accepted_updates(run)
    held = [shared(update["held"], record.accepted) for record, update in zip(records, updates, strict=True)]
    return {
        "over_budget": sum(over_budget(record.accepted.to_dict(), study) for record in records),
        "over_own": sum(not within(record.budget, record.accepted) for record in records),
        "over_own_held": sum(not within(record.budget, moved) for record, moved in zip(records, held, strict=True)),
    }


def within(budget: Limits, moved: Movement) -> bool:
    """Whether a movement is within the budgets of its step; a cap on the drift is not looked at."""
    return budget.without_caps().judge(moved).feasible


def _costs(run: Run) -> dict[str, Any]:
    own = [sum(record.seconds.get(phase, 0.0) for phase in OWN_PHASES) for record in run.records]
    bare = [update["seconds"] - spent for update, spent in zip(run.updates, own, strict=True)]
    return {
        "overhead_seconds": sum(own),
        "overhead_updates": ratio(fmean(own), median(bare)),
        "audits_per_step": fmean(record.audits for record in run.records),
    }
