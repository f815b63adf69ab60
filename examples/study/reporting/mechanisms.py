"""Why things went as they went: held-out movement, livelocks, reward that was lost; and what cannot be claimed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median

from step_optim import Action, StepRecord
from study.config import PRIMARY, Condition
from study.reporting import paired
from study.reporting.evidence import BASELINE, METRICS, Evidence, arm_of, condition_of, label
from study.reporting.figures import path_length, rejections
from study.reporting.paired import Contrast
from study.reporting.wording import NOTHING, bracket, counted, listed, number, percent, verdict

FLAT = (0.9, 1.1)
"""Successive updates whose lengths have a median ratio in this range are called as long as each other."""

FRESH = (
    "Nothing is carried over from a rejection, so that each proposal is a fresh draw of about the same length, and a "
    "commit is luck. That Adam's step is as long as the learning rate says, whatever the gradient, would explain the "
    "length; it is not tested here"
)
"""Why a gate that rolls everything back goes on rejecting."""

KEPT = "keep_state"
"""What a rejection keeps under the option ``on_reject`` if moments are to see the gradient."""

RATIOS = {
    "ratio_mean": ("on the slices that both have, held-out prompts move", "as far as the control set"),
    "ratio_worst": ("of these slices, the worst one moves", "as far as the control set's worst"),
    "ratio_unseen": ("slices that are held out whole move", "as far as the control set"),
}
"""Held-out over control, in words."""


def generalises(evidence: Evidence) -> Iterator[str]:
    """Say whether held-out prompts move as far as the control set."""
    for name, (above, below) in RATIOS.items():
        found = by_seed(evidence, name)
        if found.mean is not None:
            yield f"{above} {number(1 + found.mean)} times {below}: {_against_one(found)}"
    limited = [f for arm in evidence.arms for c in evidence.limited(arm) for f in evidence.of(arm, c).values()]
    commits, control, held = (sum(getattr(f, n) for f in limited) for n in ("accepted", "over_own", "over_own_held"))
    if commits:
        yield (
            f"of the {counted(commits, 'update')} that controllers committed, {control} exceeded their own budget on "
            f"the control set, and {held} would have on the held-out prompts of the same slices"
        )
        yield (
            "all runs share one control set and one held-out set: the intervals are over training seeds, and say "
            "nothing about other prompts"
        )


def by_seed(evidence: Evidence, ratio: str) -> Contrast:
    """A ratio less 1, averaged over the runs of each seed: conditions of one seed are no independent draws.

    Only seeds that have every condition are compared, if there are any: others are of another composition.
    """
    seeds = [set(found) for found in evidence.figures.values()]
    whole = set.intersection(*seeds) if seeds else set()
    values: dict[int, list[float]] = {}
    for found in evidence.figures.values():
        for seed, figures in found.items():
            value = getattr(figures, ratio)
            if paired.is_known(value) and (seed in whole or not whole):
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
    share = sum(map(len, streaks)) / sum(map(len, runs))
    ended = sum(all(record.action is Action.REJECT for record in records[-2:]) for records in runs)
    kls = [b.candidate.mean / a.candidate.mean for a, b in pairs if a.candidate.mean > 0 and b.candidate.is_finite]
    norms = [b.update_norm / a.update_norm for a, b in pairs if a.update_norm > 0]
    return (
        f"up to {longest} rejections in a row; {ended} of {counted(len(runs), 'run')} ended in such a row. From one "
        f"rejected candidate to the next, the length of the update changed by a factor of {_range(norms)} and its KL "
        f"by {_range(kls)}. {explained(norms, kls, way, share)}"
    )


def explained(norms: Sequence[float], kls: Sequence[float], way: str = "", share: float = 1.0) -> str:
    """Say what the sizes of successive rejected candidates explain, given the condition's way out.

    Args:
        norms: length of an update over that of the one before, of each pair of rejections in a row.
        kls: the same of K_global.
        way: what could make the next proposal smaller.
        share: of the updates that were rejected all the same.
    """
    if not norms or not kls:
        return "Their sizes are not known"
    length, kl = median(norms), median(kls)
    if FLAT[0] <= length <= FLAT[1] and kl >= FLAT[0]:
        return f"Neither becomes smaller, in spite of {way}" if way else FRESH
    if way and kl < FLAT[0]:
        return f"By {way}, the next proposal moves less: a way out, at the price of {percent(share)} of the updates"
    return "Steps of one size do not explain these rejections"


def _range(values: Sequence[float]) -> str:
    """Median, and from where to where."""
    if not values:
        return NOTHING
    return f"{number(median(values))} (median; {number(min(values))} to {number(max(values))})"


def reward_lost(evidence: Evidence) -> Iterator[str]:
    """Say whether interpolation lost reward, and whether it moved less or worse."""
    for arm in evidence.arms:
        gain, earned = (evidence.contrast(metric, arm, "interpolate") for metric in ("gain", "reward_per_length"))
        if gain.n == 0:
            continue
        said = f"{arm_of(arm).label}: {METRICS['gain'].words} {verdict(gain)}"
        if gain.n < paired.SEEDS_FOR_WORDS or gain.direction >= 0:
            yield said if gain.n < paired.SEEDS_FOR_WORDS else f"{said}; there is no loss to explain"
            continue
        moved = [_length(evidence, arm, condition) for condition in ("interpolate", BASELINE)]
        yield (
            f"{said}. Its path is {number(moved[0])} long (the sum of √K_global over its updates), that of "
            f"{label(BASELINE)} {number(moved[1])}; the gain per length {verdict(earned)}. "
            f"{less_or_worse(moved, earned)}"
        )


def _length(evidence: Evidence, arm: str, condition: str) -> float:
    """Length of a run's path on the control set, mean over seeds."""
    runs = [run for run in evidence.whole_runs if (run.arm, run.condition) == (arm, condition)]
    return fmean(path_length(run) for run in runs)


def less_or_worse(moved: Sequence[float], earned: Contrast) -> str:
    """Say why reward is lower, from how far the policy went and what each part of the way earned."""
    if moved[0] >= moved[1]:
        return "It did not go less far, so that shorter steps do not explain the loss"
    if earned.direction < 0:
        return "It went less far, and each part of the way earned less"
    return "It went less far, and no loss per length can be seen: slower, not worse"


def shocks_harm(evidence: Evidence) -> Iterator[str]:
    """Say what the shocks did to the baseline, and to the primary condition, against calm training."""
    shocked, condition, baseline = PRIMARY
    for calm in (arm for arm in evidence.arms if arm_of(arm).learning_rate == arm_of(shocked).learning_rate):
        for other in (baseline, condition):
            found = {m: evidence.contrast(m, shocked, other, baseline, calm) for m in ("gain", "drift", "nll_change")}
            if calm != shocked and found["gain"].n:
                said = "; ".join(f"{METRICS[metric].words} {verdict(contrast)}" for metric, contrast in found.items())
                yield f"{label(other)} under shocks against {label(baseline)} without: {said}"


def limits(evidence: Evidence) -> Iterator[str]:
    """What cannot be claimed."""
    study = evidence.study
    how = f"LoRA of rank {study.lora_rank}, {study.updates} updates, responses of {study.horizon} tokens"
    yield f"scale: {study.model}, {how}"
    yield "RLHF: the reward is a proxy (a count of long words), with no reward model and no human preference behind it"
    yield (
        "a ranking of methods: each ran at one strength (budget, target, coefficient), chosen from a pilot of two runs "
        "and not tuned; and a gate differs from interpolation in its budgets as well as in its rule (see Setup)"
    )
    yield (
        "what M leaves out: it judges single updates, and does not punish the drift that they add up to; and its "
        "tolerances are wider than the budgets, so that S is 1, or nearly, for every controller by construction"
    )
    seeds = sorted({len(evidence.of(arm, condition)) for arm, condition in evidence.figures})
    if seeds:
        runs = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else counted(seeds[0], "seed")
        yield (
            f"statistics: conditions have {runs}; with {counted(seeds[0], 'seed')} p cannot be below "
            f"{number(paired.smallest_p(seeds[0]))}, and an interval is hardly more than the range of the seeds. "
            "Everything but M of the primary contrast is descriptive"
        )
    yield (
        'absence: "no difference that this study can see" is no proof that there is none; the interval says how '
        "large it could be"
    )
    yield (
        f"shocks: learning rates x {number(study.shock_factor)} at t = {listed([str(t) for t in study.shocks])} test "
        "the mechanism; training usually fails in other ways"
    )
    yield "safety: the harm-adjacent slice holds everyday questions near a risk; it is no measure of safety"
