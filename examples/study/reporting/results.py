"""The tables of results: by arm, the contrasts, the learning-rate grid, the branches, and the paper's own table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from study.config import CONDITIONS, PRIMARY
from study.reporting import forks
from study.reporting.evidence import BASELINE, COMPONENTS, HIGH, METRICS, Evidence, arm_of, label
from study.reporting.figures import Figures
from study.reporting.forks import OUTCOMES, Forks
from study.reporting.paired import SEEDS_FOR_P, Contrast, smallest_p
from study.reporting.wording import bracket, counted, difference, folded, listed, number, spread, table

OUTCOME: Mapping[str, str] = {
    "score": "M ↑",
    "gain": "ΔR ↑",
    "stability": "S_stability ↑",
    "worst_stability": "S_worst ↑",
    "reward": "reward ↑",
    "unseen_gain": "ΔR, unseen slices ↑",
    "drift": "drift ↓",
    "held_worst_max": "max worst-slice K ↓",
    "nll_change": "ΔNLL ↓",
    "reward_per_length": "ΔR / Σ√K ↑",
}
"""Figures of `figures.Figures` in the first table of an arm, with their headings."""

MOVEMENT: Mapping[str, str] = {
    "held_mean": "K held-out, mean",
    "held_max": "max",
    "control_mean": "K control, mean",
    "control_max": "max",
    "control_worst_max": "worst slice, max",
    "control_drift": "drift, control",
    "ratio_mean": "K held-out / control",
    "ratio_worst": "worst slice, held-out / control",
    "over_budget": "commits over budget",
    "rejected": "updates lost",
    "overhead_updates": "overhead per update [bare updates]",
    "overhead_seconds": "overhead [s]",
    "audits_per_step": "audits per update",
}
"""In the second."""

SHORT: Mapping[str, str] = {
    "score": "M ↑",
    "gain": "ΔR ↑",
    "stability": "S_stability ↑",
    "worst_stability": "S_worst ↑",
    "drift": "drift ↓",
    "overhead_updates": "overhead [bare updates] ↓",
}
"""In the table of the summary."""

GRID = ("score", "gain", "reward", "stability", "worst_stability", "drift", "held_worst_max", "nll_change")
"""In the table of learning rates."""

PAPER: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("fixed", "gate", "breaker", "interpolate", "ema"), (".4321 ± .0221", ".3525")),
    "project": (".2992 ± .0163", ".3525"),
    **dict.fromkeys(("ratchet_cap", "ratchet"), (".2431 ± .0182", "-.2025")),
}
"""The paper's Table 2: primary metric, proxy reward."""

STATISTICS = ("n", "difference", "95 % interval", "p", "Holm p", "d_z", "95 % interval of d_z")


def primary_part(evidence: Evidence) -> Iterator[str]:
    """The pre-registered contrast, in every figure."""
    arm, condition, baseline = PRIMARY
    yield f"**Primary contrast**: {label(condition)} - {label(baseline)}, {arm_of(arm).label}, paired by seed."
    yield table(["figure", *STATISTICS], ([METRICS[m].heading, *statistics(c)] for m, c in evidence.primary.items()))
    yield (
        f"M is the one test that was fixed before these runs (in `config.py`, after a pilot of two); Holm's "
        f"correction is over its {len(COMPONENTS)} components; the other figures are descriptive. Intervals are of "
        "the mean difference (95 %, percentile bootstrap over seeds; of 3 seeds it is their range), p is of the exact "
        "two-sided sign-flip test, d_z is mean over standard deviation of the differences."
    )


def statistics(found: Contrast) -> list[str]:
    """Cells of a contrast."""
    return [
        str(found.n),
        number(found.mean),
        bracket(found.low, found.high),
        "" if found.p is None else number(found.p),
        "" if found.holm is None else number(found.holm),
        "" if found.effect is None else number(found.effect),
        bracket(found.effect_low, found.effect_high),
    ]


def results_part(evidence: Evidence) -> Iterator[str]:
    """Figures and contrasts, arm by arm."""
    yield "## Results"
    yield (
        "Mean ± standard deviation over seeds; K, drift and NLL in nats per token, held-out unless it says control. "
        "*Commits over budget* judges every condition by the study's budgets on the control set, also those that have "
        "none. A difference is in bold if there are at least 3 seeds and its interval excludes 0: of 3 seeds that "
        "says that all agree in sign, which chance alone does 1 time in 4."
    )
    for arm in evidence.arms:
        title = arm_of(arm).label
        yield f"### {title[:1].upper()}{title[1:]}"
        for columns in (OUTCOME, MOVEMENT):
            rows = [_row(label(c), list(evidence.of(arm, c).values()), columns) for c in evidence.conditions(arm)]
            yield table(["condition", "seeds", *columns.values()], rows)
        yield from _contrasts(evidence, arm, arm)
        if arm == HIGH and evidence.tuned not in (None, arm):
            yield from _contrasts(evidence, arm, str(evidence.tuned))


def _row(name: str, found: Sequence[Figures], columns: Mapping[str, str]) -> list[str]:
    cells = [spread(getattr(figures, column) for figures in found) for column in columns]
    idle = sum(figures.accepted == 0 for figures in found)
    return [f"{name} ({counted(idle, 'seed')} accepted nothing)" if idle else name, str(len(found)), *cells]


def _contrasts(evidence: Evidence, arm: str, baseline_arm: str) -> Iterator[str]:
    families = {metric: evidence.family(metric, arm, baseline_arm) for metric in METRICS}
    names = list(families["score"])
    if not names:
        return
    tuned = "" if baseline_arm == arm else f" at its best learning rate ({number(arm_of(baseline_arm).learning_rate)})"
    yield f"Differences from {label(BASELINE)}{tuned}, paired by seed:"
    rows = ([label(name), *(difference(families[metric][name]) for metric in METRICS)] for name in names)
    yield table(["condition", *(metric.heading for metric in METRICS.values())], rows)
    yield from _few_seeds(families["score"])
    detailed = (
        [f"{METRICS[metric].symbol}: {label(name)}", *statistics(families[metric][name])]
        for metric in METRICS
        for name in names
    )
    title = "Interval, p, Holm p (over the conditions of this arm, each figure by itself), d_z"
    yield folded(title, table(["contrast", *STATISTICS], detailed))


def _few_seeds(family: Mapping[str, Contrast]) -> Iterator[str]:
    few = sorted({found.n for found in family.values() if 0 < found.n < SEEDS_FOR_P})
    if few:
        least = listed([f"{number(smallest_p(n))} with {counted(n, 'seed')}" for n in few])
        yield f"No p below .05 was possible with fewer than {SEEDS_FOR_P} seeds (the least is {least}): read estimates."


def short_table(evidence: Evidence, arm: str) -> str:
    """What an arm comes to, a line for each condition."""
    rows = []
    for name in evidence.conditions(arm):
        found = list(evidence.of(arm, name).values())
        cells = [spread(getattr(figures, column) for figures in found) for column in SHORT]
        against = "" if name == BASELINE else difference(evidence.contrast("score", arm, name))
        rows.append([label(name), str(len(found)), *cells, against])
    return table(["condition", "seeds", *SHORT.values(), "difference in M"], rows)


def grid_part(evidence: Evidence) -> Iterator[str]:
    """Fixed KL over learning rates."""
    yield "## Learning rates"
    if not evidence.grid:
        yield f"No run of {label(BASELINE)} without shocks: there is no grid."
        return
    rows = []
    for arm in evidence.grid:
        found = list(evidence.of(arm, BASELINE).values())
        rate = number(arm_of(arm).learning_rate) + (" (best M)" if arm == evidence.tuned else "")
        rows.append([rate, str(len(found)), *(spread(getattr(f, column) for f in found) for column in GRID)])
    yield f"{label(BASELINE)} without shocks:"
    yield table(["learning rate", "seeds", *(OUTCOME[column] for column in GRID)], rows)
    yield (
        'The best learning rate ("lr-tuned") has the highest mean M. It is chosen on the seeds that it is then '
        "compared on, which favours it: a high bar for the controllers."
    )


def branching_part(branches: Forks) -> Iterator[str]:
    """What each decision gives from the same weights."""
    yield "## Branches from the same weights"
    if not branches.points:
        yield "No branches were run."
        return
    points, seeds = counted(len(branches.points), "point"), counted(len(branches.seeds), "seed")
    yield (
        f"{points} (seed, t) of {seeds}. From one theta_t and one candidate, every branch commits in its own way and "
        "then makes one ordinary update more. Rewards are held-out, minus that of theta_t; distances are the mean "
        "squared difference from the candidate's logits. Points of one seed lie on one path, so that differences are "
        "averaged within a seed before they are judged."
    )
    rows = ([forks.label(b), *(number(v) for v in branches.means(b).values())] for b in branches.names)
    yield table(["branch", *(OUTCOMES[outcome].heading for outcome in branches.outcomes)], rows)
    for baseline in ("accept", "shrink"):
        if baseline in branches.names and len(branches.names) > 1:
            yield from _forked(branches, baseline)


def _forked(branches: Forks, baseline: str) -> Iterator[str]:
    families = {outcome: branches.family(outcome, baseline) for outcome in branches.outcomes if outcome != "seconds"}
    names = [name for name in branches.names if name != baseline]
    yield f'Differences from "{forks.label(baseline)}", paired by point, averaged within a seed:'
    rows = ([forks.label(name), *(difference(family[name]) for family in families.values())] for name in names)
    yield table(["branch", *(OUTCOMES[outcome].heading for outcome in families)], rows)
    detailed = (
        [f"{OUTCOMES[outcome].heading}: {forks.label(name)}", *statistics(families[outcome][name])]
        for outcome in ("gain_now", "gain_next")
        if outcome in families
        for name in names
    )
    yield folded("Rewards: interval, p, Holm p (over branches), d_z", table(["contrast", *STATISTICS], detailed))


def paper_part(evidence: Evidence) -> Iterator[str]:
    """The paper's Table 2, and ours."""
    yield "## Beside the paper's Table 2"
    yield (
        "Only the structure can be compared: which conditions differ, and in which component. The paper's model, "
        "reward, budgets and the scaling of its metric are not known; five of its rows, and two others, agree to the "
        f"last digit. Ours: {arm_of(PRIMARY[0]).label}."
    )
    rows = []
    for name in (name for name, condition in CONDITIONS.items() if condition.paper is not None):
        found = list(evidence.of(PRIMARY[0], name).values())
        ours = [spread(getattr(figures, column) for figures in found) for column in ("score", "reward", *COMPONENTS)]
        rows.append([label(name), *PAPER.get(name, ("", "")), str(len(found)), *ours])
    head = ["condition", "paper: primary metric", "paper: reward", "ours: seeds", "M", "reward"]
    yield table([*head, *(METRICS[component].symbol for component in COMPONENTS)], rows)
