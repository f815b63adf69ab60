"""Pictures that compare: outcomes by condition, differences from the baseline, learning rates, branches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from study.reporting import forks
from study.reporting.evidence import BASELINE, Evidence, arm_of, label
from study.reporting.forks import Forks
from study.reporting.style import BRANCHES, GREY, drawn, few_ticks, logarithmic, look, named_beside, row, rows_named
from study.reporting.wording import counted

OUTCOME_PANELS = {
    "gain": "gain in\nheld-out reward\n(more is better)",
    "drift": "drift from\nthe first policy\n[nats/token] (less is better)",
    "held_worst_max": "largest slice KL\nof an update\n[nats/token] (less is better)",
    "nll_change": "NLL rise on the\nfirst policy's responses\n[nats/token] (less is better)",
}
DIFFERENCE_PANELS = {
    "score": "M = ΔR · S · S",
    "gain": "ΔR: gain in\nheld-out reward",
    "stability": "S_stability: updates within\ntolerance, all prompts",
    "worst_stability": "S_worst: updates within\ntolerance, worst slice",
}
BRANCH_PANELS = {
    "gain_next": "held-out reward one update\nlater, minus theta_t's (more\nis better)",
    "paired": "the same, minus that\nafter accepting (paired)",
    "held": "held-out movement\n[nats/token]",
    "distance_held": "logit distance to the\ncandidate, held-out",
}
WIDE = 12.0
"""Ratio of largest to smallest value above which an axis is logarithmic."""


def draw_outcomes(evidence: Evidence, arm: str, path: Path) -> str:
    """Dots: seeds, mean and interval of every condition, in four figures."""
    conditions = evidence.conditions(arm)
    if not conditions:
        return ""
    title = f"What each condition gained, and how far it moved ({arm_of(arm).label})"
    with drawn(path, 2.2 + 0.42 * len(conditions), ncols=len(OUTCOME_PANELS), sharey=True) as (figure, axes):
        figure.suptitle(title, fontweight="bold")
        for panel, (metric, heading) in zip(axes[0], OUTCOME_PANELS.items(), strict=True):
            every = [evidence.known(arm, condition, metric) for condition in conditions]
            for y, (condition, values) in enumerate(zip(conditions, every, strict=True)):
                row(panel, y, values, *look(condition))
            if evidence.known(arm, BASELINE, metric):
                middle = fmean(evidence.known(arm, BASELINE, metric))
                panel.axvline(middle, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
            panel.set_title(heading, fontsize=10)
            _scaled(panel, [value for values in every for value in values])
        names = [f"{label(c)} ({len(evidence.of(arm, c))})" for c in conditions]
        rows_named(axes[0, 0], names, [look(c)[0] for c in conditions])
        figure.supxlabel(
            "dots: seeds (number in brackets); mark and bar: mean and 95 % bootstrap interval (of 3 seeds: the range); "
            f"dotted: {label(BASELINE)}",
            fontsize=10,
        )
    return title


def _scaled(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) / min(values) > WIDE:
        logarithmic(axes, "x")
        axes.grid(axis="x", alpha=0.25)
    else:
        few_ticks(axes)


def draw_differences(evidence: Evidence, arm: str, path: Path) -> str:
    """Forest: differences from the baseline in M and its components, with intervals."""
    conditions = [c for c in evidence.conditions(arm) if c != BASELINE and evidence.contrast("score", arm, c).n]
    if not conditions:
        return ""
    title = f"Difference from {label(BASELINE)}, paired by seed (right of the line is better)"
    with drawn(path, 2.2 + 0.42 * len(conditions), ncols=len(DIFFERENCE_PANELS), sharey=True) as (figure, axes):
        figure.suptitle(title, fontweight="bold")
        for panel, (metric, heading) in zip(axes[0], DIFFERENCE_PANELS.items(), strict=True):
            for y, condition in enumerate(conditions):
                found = evidence.contrast(metric, arm, condition)
                row(panel, y, found.differences, *look(condition), sure=found.direction != 0)
            panel.axvline(0, color="black", linewidth=1, zorder=0)
            panel.set_title(heading, fontsize=10)
            few_ticks(panel)
        names = [f"{label(c)} ({evidence.contrast('score', arm, c).n})" for c in conditions]
        rows_named(axes[0, 0], names, [look(c)[0] for c in conditions])
        figure.supxlabel(
            "dots: seeds (number in brackets); mark and bar: mean and 95 % bootstrap interval (of 3 seeds: the range), "
            "filled if that excludes 0;\nwith fewer than 6 seeds no test can reach .05",
            fontsize=10,
        )
    return title


def draw_learning_rates(evidence: Evidence, path: Path) -> str:
    """Points: what a condition gained against how far it went, for every learning rate."""
    if not evidence.grid:
        return ""
    title = "Reward gained against movement, at several learning rates (no shocks; up and left is better)"
    panels = {"drift": "drift from the first policy", "held_worst_max": "largest slice KL of an update"}
    with drawn(path, 5.2, ncols=2, sharey=True) as (figure, axes):
        figure.suptitle(title, fontweight="bold", fontsize=11.5)
        for panel, (metric, heading) in zip(axes[0], panels.items(), strict=True):
            _frontier(panel, evidence, metric, names=panel is axes[0, -1])
            panel.set_xlabel(f"{heading} [nats/token]")
        axes[0, 0].set_ylabel("gain in held-out reward")
        figure.supxlabel("marks: means over seeds; small dots: seeds; numbers: learning rates", fontsize=10)
    return title


def _frontier(axes: Axes, evidence: Evidence, metric: str, *, names: bool) -> None:
    grid = [(arm, *_means(evidence, arm, BASELINE, metric)) for arm in evidence.grid]
    axes.plot([x for _, x, _ in grid], [y for _, _, y in grid], "o-", color=look(BASELINE)[0], markersize=8)
    for i, (arm, x, y) in enumerate(grid):
        _seeds(axes, evidence, arm, BASELINE, metric)
        side = 1 if i and y < grid[i - 1][2] else -1  # where the line is not
        place = {"xytext": (7 * side, 6), "ha": "left" if side > 0 else "right"}
        rate = f"{arm_of(arm).learning_rate:g}"
        text = axes.annotate(rate, (x, y), textcoords="offset points", fontsize=10, **place)
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    named = [(grid[-1][1], grid[-1][2], f"{label(BASELINE)} (line)", look(BASELINE)[0])]
    for arm in (arm for arm in evidence.arms if not arm_of(arm).shocked):
        for condition in (c for c in evidence.conditions(arm) if c != BASELINE):
            (x, y), (colour, marker) = _means(evidence, arm, condition, metric), look(condition)
            axes.plot(x, y, marker, color=colour, markersize=9)
            _seeds(axes, evidence, arm, condition, metric)
            named.append((x, y, f"{label(condition)}, {arm_of(arm).learning_rate:g}", colour))
    axes.margins(0.2, 0.12)
    axes.grid(alpha=0.25)
    if names:
        named_beside(axes, named)


def _seeds(axes: Axes, evidence: Evidence, arm: str, condition: str, metric: str) -> None:
    xs, ys = evidence.known(arm, condition, metric), evidence.known(arm, condition, "gain")
    axes.plot(xs, ys, ".", color=look(condition)[0], alpha=0.4, markersize=6, markeredgewidth=0)


def _means(evidence: Evidence, arm: str, condition: str, metric: str) -> tuple[float, float]:
    return fmean(evidence.known(arm, condition, metric)), fmean(evidence.known(arm, condition, "gain"))


def draw_branches(branches: Forks, path: Path) -> str:
    """Dots: what each decision gives from the same weights."""
    panels = [panel for panel in BRANCH_PANELS if any(_branch_values(branches, name, panel) for name in branches.names)]
    if not panels:
        return ""
    title = f"From the same weights: what does each decision give? ({counted(len(branches.points), 'point')})"
    with drawn(path, 2.2 + 0.45 * len(branches.names), ncols=len(panels), sharey=True) as (figure, axes):
        figure.suptitle(title, fontweight="bold")
        for panel, outcome in zip(axes[0], panels, strict=True):
            for y, name in enumerate(branches.names):
                row(panel, y, _branch_values(branches, name, outcome), BRANCHES.get(name, GREY))
            panel.axvline(0, color="black", linewidth=1, zorder=0)
            panel.set_title(BRANCH_PANELS[outcome], fontsize=11)
            few_ticks(panel)
        names = [forks.label(name) for name in branches.names]
        rows_named(axes[0, 0], names, [BRANCHES.get(name, GREY) for name in branches.names])
        figure.supxlabel(
            f"dots: points (seed, t), on {len(branches.seeds)} paths; mark and bar: mean and 95 % interval over points",
            fontsize=10,
        )
    return title


def _branch_values(branches: Forks, name: str, panel: str) -> Sequence[float]:
    if panel == "paired":
        return list(branches.differences("gain_next", name, "accept").values())
    return branches.known(name, panel)
