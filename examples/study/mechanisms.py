"""Why things went as they went: held-out movement, livelocks, reward that was lost; and what cannot be claimed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median

import paired
from config import Condition
from evidence import BASELINE, METRICS, Evidence, arm_of, condition_of, label
from figures import rejections
from paired import Contrast
from wording import NOTHING, bracket, counted, listed, number, verdict

from step_optim import Action, StepRecord

FLAT = (0.8, 1.25)
"""Successive updates whose lengths have a median ratio in this range are called as long as each other."""

ADAM = (
    "Neither becomes smaller: Adam divides a gradient by the root of its second moment, so that a step is as long as "
    "the learning rate says, whatever the gradient's size; from the same weights and moments, the next candidate is "
    "as large as the last, and is rejected in turn"
)
"""Why a gate that rolls everything back rejects for ever."""

KEPT = "keep_state"
"""What a rejection keeps under the option ``on_reject`` if moments are to see the gradient."""

RATIOS = {
    "ratio_mean": ("movement on held-out prompts", "that on the control set"),
    "ratio_worst": ("the worst held-out slice's movement", "the worst slice's on the control set"),
    "ratio_unseen": ("movement on the slices that are held out whole", "that on the control set"),
}
"""Held-out over control, in words."""


def generalises(evidence: Evidence) -> Iterator[str]:
    """Say whether held-out prompts move as far as the control set."""
    for name, (above, below) in RATIOS.items():
        found = by_seed(evidence, name)
        if found.mean is not None:
            yield f"{above} is {number(1 + found.mean)} times {below}: {_against_one(found)}"
    limited = [f for arm in evidence.arms for c in evidence.limited(arm) for f in evidence.of(arm, c).values()]
    commits, control, held = (
        sum(getattr(f, n) for f in limited) for n in ("accepted", "over_budget", "over_budget_held")
    )
    if commits:
        yield (
            f"controllers committed {counted(commits, 'update')}; {control} of them exceeded one of the study's "
            f"budgets (their own or not: a gate has one of the two) on the control set, and {held} on held-out prompts"
        )


def by_seed(evidence: Evidence, ratio: str) -> Contrast:
    """A ratio less 1, averaged over the runs of each seed: conditions of one seed are no independent draws."""
    values: dict[int, list[float]] = {}
    for found in evidence.figures.values():
        for seed, figures in found.items():
            value = getattr(figures, ratio)
            if value is not None:
                values.setdefault(seed, []).append(value - 1)
    return paired.of({seed: fmean(known) for seed, known in sorted(values.items())})


def _against_one(found: Contrast) -> str:
    """A ratio less 1, in words."""
    seeds = counted(found.n, "seed")
    if found.low is None or found.high is None:
        return seeds
    side = {1: "above 1", -1: "below 1", 0: "not distinguishable from 1"}[found.direction]
    return f"{side} (interval {bracket(1 + found.low, 1 + found.high)}, {seeds})"


def livelock(evidence: Evidence) -> Iterator[str]:
    """Say what successive rejected candidates look like under each gate."""
    for arm in evidence.arms:
        for condition in evidence.limited(arm):
            rule = condition_of(condition)
            if rule.controller == "Gate":
                runs = [run.records for run in evidence.whole_runs if (run.arm, run.condition) == (arm, condition)]
                yield f"{label(condition)}, {arm_of(arm).label}: {_stuck(runs, way_out(rule))}"


def way_out(rule: Condition) -> str:
    """What could make the next proposal another one than the last; nothing, if a rejection leaves no trace."""
    if rule.warm_start:
        return "the warm start"
    return "the moments that are kept" if rule.options.get("on_reject") == KEPT else ""


def _stuck(runs: Sequence[Sequence[StepRecord]], way: str) -> str:
    streaks = [group for records in runs for group in rejections(records)]
    longest = max(map(len, streaks), default=0)
    pairs = [pair for group in streaks for pair in pairwise(group) if pair[0].lr == pair[1].lr]
    if not pairs:
        return f"no two rejections in a row at one learning rate (at most {longest} in a row): no livelock to explain"
    ended = sum(all(record.action is Action.REJECT for record in records[-2:]) for records in runs)
    kls = [b.candidate.mean / a.candidate.mean for a, b in pairs if a.candidate.mean > 0 and b.candidate.is_finite]
    norms = [b.update_norm / a.update_norm for a, b in pairs if a.update_norm > 0]
    return (
        f"up to {longest} rejections in a row; {ended} of {counted(len(runs), 'run')} ended in such a row. From one "
        f"rejected candidate to the next, the length of the update changed by a factor of {_range(norms)} and its KL "
        f"by {_range(kls)}. {explained(norms, kls, way)}"
    )


def explained(norms: Sequence[float], kls: Sequence[float], way: str = "") -> str:
    """Say what the sizes of successive rejected candidates explain, given the condition's way out."""
    if not norms or not kls:
        return "Their sizes are not known"
    length, kl = median(norms), median(kls)
    if FLAT[0] <= length <= FLAT[1] and kl >= FLAT[0]:
        return f"Neither becomes smaller, in spite of {way}" if way else ADAM
    if way and length < FLAT[0]:
        return f"The step becomes shorter from one rejection to the next, by {way}: a way out"
    return "Steps of one size do not explain these rejections"


def _range(values: Sequence[float]) -> str:
    """Median, and from where to where."""
    if not values:
        return NOTHING
    return f"{number(median(values))} (median; {number(min(values))} to {number(max(values))})"


def reward_lost(evidence: Evidence) -> Iterator[str]:
    """Say whether interpolation lost reward, and whether it moved less or worse."""
    for arm in evidence.arms:
        gain, per_nat = (evidence.contrast(metric, arm, "interpolate") for metric in ("gain", "reward_per_nat"))
        if gain.n == 0:
            continue
        said = f"{arm_of(arm).label}: {METRICS['gain'].words} {verdict(gain)}"
        if gain.n < paired.SEEDS_FOR_WORDS or gain.direction >= 0:
            yield said if gain.n < paired.SEEDS_FOR_WORDS else f"{said}; there is no loss to explain"
            continue
        moved = [_nats(evidence, arm, condition) for condition in ("interpolate", BASELINE)]
        yield (
            f"{said}. Its updates moved the policy by {number(moved[0])} nats per token in all, those of "
            f"{label(BASELINE)} by {number(moved[1])}; the gain per nat {verdict(per_nat)}. "
            f"{less_or_worse(moved, per_nat)}"
        )


def _nats(evidence: Evidence, arm: str, condition: str) -> float:
    """K_global that a run spends on the control set, mean over seeds."""
    return fmean(f.control_mean * f.accepted for f in evidence.of(arm, condition).values())


def less_or_worse(moved: Sequence[float], per_nat: Contrast) -> str:
    """Say why reward is lower, from what was spent and what each nat earned."""
    if moved[0] >= moved[1]:
        return "It did not move less, so that shorter steps do not explain the loss"
    if per_nat.direction < 0:
        return "It moved less, and each nat earned less"
    return "It learned less because it moved less: no loss per nat can be seen"


def limits(evidence: Evidence) -> Iterator[str]:
    """What cannot be claimed."""
    study = evidence.study
    how = f"LoRA of rank {study.lora_rank}, {study.updates} updates, responses of {study.horizon} tokens"
    yield f"scale: {study.model}, {how}"
    yield "RLHF: the reward is a proxy (a count of long words), with no reward model and no human preference behind it"
    seeds = sorted({len(evidence.of(arm, condition)) for arm, condition in evidence.figures})
    if seeds:
        runs = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else counted(seeds[0], "seed")
        yield (
            f"statistics: conditions have {runs}; with {seeds[0]} the least p is "
            f"{number(paired.smallest_p(seeds[0]))}, and a percentile interval covers less than 95 %. What was not "
            "pre-registered is an estimate"
        )
    yield (
        'absence: "no difference that this study can see" is no proof that there is none; the interval says how '
        "large it "
        "could be"
    )
    yield (
        f"shocks: learning rates x {number(study.shock_factor)} at t = {listed([str(t) for t in study.shocks])} test "
        "the mechanism; training usually fails otherwise"
    )
    yield "safety: the harm-adjacent slice holds everyday questions near a risk; it is no measure of safety"
