"""The answer in a paragraph, and in sentences per question, all computed from the contrasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from study.config import PRIMARY
from study.reporting import forks, paired
from study.reporting.evidence import BASELINE, HIGH, METRICS, Evidence, arm_of, label
from study.reporting.forks import OUTCOMES, Forks
from study.reporting.mechanisms import generalises, livelock, reward_lost, shocks_harm
from study.reporting.paired import Contrast
from study.reporting.wording import listed, number, percent, sentence, verdict

MEANINGS = {
    (1, 1): "STEP helped: M and reward are both higher",
    (1, 0): "STEP helped: M is higher, at no loss of reward that this study can see",
    (1, -1): "STEP bought stability with reward: M is higher, and reward lower",
    (0, 1): "reward is higher, and no difference in M can be seen",
    (0, 0): "STEP neither helped nor slowed learning in a way that this study can see",
    (0, -1): "STEP only slowed learning: reward is lower, and M no better",
    (-1, 1): "STEP hurt M, though reward is higher",
    (-1, 0): "STEP hurt: M is lower, and no difference in reward can be seen",
    (-1, -1): "STEP hurt: M and reward are both lower",
}
"""What the directions of M and of the gain in reward mean together."""

NEVER = "STEP never acted, so that these runs are the baseline's, bit for bit; nothing can be compared"

RIVALRY = ("score", "gain", "held_worst_max", "drift")
"""What controllers and objectives are compared in."""


def answer(evidence: Evidence) -> str:
    """The study in a paragraph."""
    arm, condition, baseline = PRIMARY
    found = evidence.primary
    if found["score"].n == 0:
        return (
            f"The primary contrast ({label(condition)} against {label(baseline)}, {arm_of(arm).label}) has not been "
            "run: this study has no answer yet."
        )
    what = f"{arm_of(arm).label}, {evidence.study.updates} updates of {evidence.study.model}"
    opening = f"{label(condition)} against {label(baseline)} ({what}): {conclusion(found['score'], found['gain'])}"
    parts = [f"{METRICS[m].words} {verdict(found[m])}" for m in ("score", "gain", "drift")]
    others = [*_acted(evidence, arm, condition), *ahead(evidence), *against_tuned(evidence, HIGH, condition)]
    return " ".join(map(sentence, (opening, *parts, *others)))


def conclusion(score: Contrast, gain: Contrast) -> str:
    """Say what M and reward mean together."""
    n = min(score.n, gain.n)
    if n < paired.SEEDS_FOR_WORDS:
        return "too few seeds to say anything"
    weak = n < paired.SEEDS_FOR_P and (score.direction or gain.direction)
    return MEANINGS[score.direction, gain.direction] + (f" ({n} seeds: too few for a test)" if weak else "")


def _acted(evidence: Evidence, arm: str, condition: str) -> Iterator[str]:
    """How often the controller acted, how hard, and at what price."""
    found = list(evidence.of(arm, condition).values())
    alphas = [alpha for figures in found for alpha in figures.alphas]
    text = f"the controller acted on {percent(fmean(figures.trigger_rate for figures in found))} of the updates"
    precision, recall = (evidence.known(arm, condition, name) for name in ("precision", "recall"))
    if recall:
        exact = f", {percent(fmean(precision))} of its triggers were shocks" if precision else ""
        text += f" ({percent(fmean(recall))} of the known shocks triggered it{exact})"
    if alphas:
        text += f", with a median alpha of {number(median(alphas))}"
    yield f"{text}; it {price(evidence, arm, condition)}"


def ahead(evidence: Evidence) -> Iterator[str]:
    """Which means of the objective had a higher M than the primary condition, and how far they went."""
    arm, condition, _ = PRIMARY
    scores = {name: evidence.contrast("score", arm, name, condition).mean for name in rivals(evidence)}
    names = [name for name, score in scores.items() if score is not None and score > 0]
    if names:
        drifts = [evidence.contrast("drift", arm, name, condition).mean or 0.0 for name in names]
        yield (
            f"of the objective's own means, {listed([label(name) for name in names])} had a higher mean M than "
            f"{label(condition)} on the same seeds; they drifted by {number(min(drifts), 2)} to "
            f"{number(max(drifts), 2)} nats per token more, and each ran at one strength, untuned"
        )


def rivals(evidence: Evidence) -> list[str]:
    """Conditions of the primary arm that only change the objective: stopping, coefficients, references."""
    arm, _, baseline = PRIMARY
    limited = evidence.limited(arm)
    return [name for name in evidence.conditions(arm) if name != baseline and name not in limited]


def price(evidence: Evidence, arm: str, condition: str) -> str:
    """What a condition costs: a verb, and what follows it."""
    found = evidence.of(arm, condition).values()
    overhead = evidence.known(arm, condition, "overhead_updates")
    audits, lost = (fmean(getattr(f, name) for f in found) for name in ("audits_per_step", "rejected"))
    share = percent(fmean(overhead) if overhead else None)
    text = f"adds {share} to the time of an update (audits per update: {number(audits, 2)})"
    return text + (f"; {number(lost, 2)} of {evidence.study.updates} updates were lost to rejection" if lost else "")


def against_tuned(evidence: Evidence, arm: str, condition: str) -> Iterator[str]:
    """Compare with fixed KL at its best learning rate."""
    tuned = evidence.tuned
    if tuned in (None, arm) or not evidence.of(arm, condition):
        return
    score, gain = (evidence.contrast(metric, arm, condition, BASELINE, tuned) for metric in ("score", "gain"))
    rates = [number(arm_of(name).learning_rate) for name in (arm, str(tuned))]
    yield (
        f"at a learning rate of {rates[0]}, against {label(BASELINE)} at its best one ({rates[1]}), M "
        f"{verdict(score)}, and {METRICS['gain'].words} {verdict(gain)}"
    )


@dataclass(frozen=True)
class Answer:
    """A question and what the data say."""

    question: str
    sentences: Sequence[str]


def answers(evidence: Evidence, branches: Forks) -> Iterator[Answer]:
    """All questions, in order."""
    yield Answer("When does STEP help, and when does it only slow learning?", list(_helps(evidence)))
    yield Answer("Do the shocks do harm?", list(shocks_harm(evidence)))
    yield Answer("Do the objective's own means do as much?", list(_objective(evidence)))
    yield Answer("What does each controller cost?", list(_costs(evidence)))
    yield Answer("Does projection earn its price?", list(_projection(evidence, branches)))
    yield Answer("Roll Adam's moments back with the weights, or keep them?", list(_moments(evidence, branches)))
    yield Answer("Does a warm start help?", list(_warm(evidence)))
    yield Answer("Does a control set generalise?", list(generalises(evidence)))
    yield Answer("Why does a gate livelock?", list(livelock(evidence)))
    moments = _branches_differ(branches, "shrink_restore", "shrink", ("gain_next",))
    yield Answer("Why does interpolation lose reward, where it does?", [*reward_lost(evidence), *moments])


def in_short(evidence: Evidence) -> Iterator[str]:
    """Each conclusion once, with the controllers and arms that it holds for."""
    found: dict[str, list[str]] = {}
    for arm in evidence.arms:
        for condition in evidence.limited(arm):
            score, gain = (evidence.contrast(metric, arm, condition) for metric in ("score", "gain"))
            if score.n:
                text = NEVER if never_acted(evidence, arm, condition) else conclusion(score, gain)
                found.setdefault(text, []).append(f"{label(condition)} ({arm_of(arm).label})")
    yield from (f"{text}: {listed(places)}" for text, places in found.items())


def never_acted(evidence: Evidence, arm: str, condition: str) -> bool:
    """Whether a controller had nothing to do in an arm."""
    return not any(found.trigger_rate for found in evidence.of(arm, condition).values())


def _helps(evidence: Evidence) -> Iterator[str]:
    yield from in_short(evidence)
    for arm in evidence.arms:
        for condition in evidence.limited(arm):
            score, gain = (evidence.contrast(metric, arm, condition) for metric in ("score", "gain"))
            if score.n == 0 or never_acted(evidence, arm, condition):
                continue
            short = f"{where(arm, condition)}: {conclusion(score, gain)}"
            said = f"M {verdict(score)}; {METRICS['gain'].words} {verdict(gain)}"
            tuned = against_tuned(evidence, arm, condition) if arm == HIGH else ()
            yield " ".join(map(sentence, (short, said, *tuned)))


def _objective(evidence: Evidence) -> Iterator[str]:
    """The primary condition against those that only change the objective."""
    arm, condition, _ = PRIMARY
    for rival in rivals(evidence):
        found = {metric: evidence.contrast(metric, arm, condition, rival) for metric in RIVALRY}
        if found["score"].n:
            said = "; ".join(f"{METRICS[metric].words} {verdict(contrast)}" for metric, contrast in found.items())
            yield f"{label(condition)} against {label(rival)}, {arm_of(arm).label}: {said}"


def _costs(evidence: Evidence) -> Iterator[str]:
    for arm in evidence.arms:
        limited = evidence.limited(arm)
        for condition in limited:
            yield f"{where(arm, condition)}: {price(evidence, arm, condition)}"
        if limited and evidence.of(arm, BASELINE):
            yield f"{where(arm, BASELINE)}, which only measures: {price(evidence, arm, BASELINE)}"


def _projection(evidence: Evidence, branches: Forks) -> Iterator[str]:
    for arm in evidence.arms:
        score, gain, drift = (evidence.contrast(m, arm, "project", "interpolate") for m in ("score", "gain", "drift"))
        if score.n == 0:
            continue
        residual = evidence.known(arm, "project", "residual_ratio")
        left = (
            f"its mean squared logit distance to the candidate was {number(fmean(residual), 2)} times that of the "
            "best interpolation, on the control set; "
            if residual
            else ""
        )
        time = evidence.contrast("overhead_seconds", arm, "project", "interpolate")
        yield (
            f"{arm_of(arm).label}: {left}against interpolation, M {verdict(score)}, {METRICS['gain'].words} "
            f"{verdict(gain)}, and {METRICS['drift'].words} {verdict(drift)}; the time for audits and "
            f"control [s a run] {verdict(time)}. {worth(score, gain, drift)}"
        )
    outcomes = ("distance_control", "distance_held", "gain_next", "seconds")
    yield from _branches_differ(branches, "project", "shrink", outcomes)
    yield from _branches_differ(branches, "project_short", "project", outcomes)


def worth(score: Contrast, gain: Contrast, drift: Contrast) -> str:
    """Say whether something is better that a higher price could be paid for."""
    n = min(score.n, gain.n)
    if n < paired.SEEDS_FOR_WORDS:
        return "Too few seeds to say whether it earns its price"
    weak = f" ({n} seeds: too few for a test)" if n < paired.SEEDS_FOR_P else ""
    if min(score.direction, gain.direction) < 0:
        return f"It does not earn its price here: something is worse{weak}"
    if max(score.direction, gain.direction) > 0 and drift.direction > 0:
        return f"It gains more and goes further: whether it earns its price, or only moves further, is open{weak}"
    if max(score.direction, gain.direction) > 0:
        return f"It gains something here that interpolation does not{weak}"
    return "It does not visibly earn its price here"


def _moments(evidence: Evidence, branches: Forks) -> Iterator[str]:
    yield from _variants(evidence, "interpolate_restore", "interpolate", {"control_mean": "K_global of its updates"})
    yield from _variants(evidence, "gate_keep", "gate", {"rejected": "the number of rejected updates"})
    for branch, original in (("reject_keep", "reject"), ("shrink_restore", "shrink"), ("shrink_between", "shrink")):
        yield from _branches_differ(branches, branch, original, ("control_next", "gain_next"))
    yield from _branches_differ(branches, "rerun", "shrink", ("gain_next", "distance_held"))


def _warm(evidence: Evidence) -> Iterator[str]:
    yield from _variants(evidence, "gate_warm", "gate", {"rejected": "the number of rejected updates"})
    others = {"trigger_rate": "the trigger rate", "overhead_seconds": "the time for audits and control [s]"}
    yield from _variants(evidence, "interpolate_warm", "interpolate", others)


def _variants(evidence: Evidence, variant: str, original: str, others: Mapping[str, str]) -> Iterator[str]:
    """Two forms of one controller, in M, reward, and what else may differ."""
    words = {name: METRICS[name].words for name in ("score", "gain")} | dict(others)
    for arm in evidence.arms:
        found = {name: evidence.contrast(name, arm, variant, original) for name in words}
        if found["score"].n:
            said = listed([f"{words[name]} {verdict(contrast)}" for name, contrast in found.items()])
            yield f"{label(variant)} against {label(original)}, {arm_of(arm).label}: {said}"


def _branches_differ(branches: Forks, a: str, b: str, outcomes: Sequence[str]) -> Iterator[str]:
    """One branch against another, in words."""
    found = {outcome: branches.contrast(outcome, a, b) for outcome in outcomes}
    said = [f"{OUTCOMES[name].words} {verdict(contrast)}" for name, contrast in found.items() if contrast.n]
    if said:
        yield f'branches, "{forks.label(a)}" against "{forks.label(b)}": {"; ".join(said)}'


def where(arm: str, condition: str) -> str:
    """A condition and its arm, in words."""
    return f"{label(condition)}, {arm_of(arm).label}"
