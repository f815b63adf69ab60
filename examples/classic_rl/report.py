"""Table and figure: return against learning rate, a line for each method, each tuned on its own grid."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from classic_rl.arms import ARMS, FAMILIES
from classic_rl.run import Result, Setting
from classic_rl.tasks import TASKS

Results = Mapping[Setting, Result]

COLOURS = {
    "ppo": "#555555",
    "target_kl": "#E69F00",
    "trpo": "#CC79A7",
    "gate": "#56B4E9",
    "step": "#0072B2",
    "unread": "#009E73",
    "rate": "#D55E00",
}

COLLAPSED = 0.5
"""A run has collapsed if it ends with less than this part of what it had reached, above what nothing learned gets."""


def table(results: Results) -> str:
    """One line for each task, method and learning rate, with the number that is best for the method on the task."""
    columns = ("task", "method", "lr", "seeds", "area", "final", "largest KL", "collapsed", "seconds")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for task in dict.fromkeys(setting.task for setting in results):
        for arm in best(results, task).values():
            for lr in sorted({s.lr for s in results if (s.task, s.arm) == (task, arm)}):
                found = _of(results, task, arm, lr)
                lines.append(
                    f"| {task} | {ARMS[arm].label} | {lr:g} | {len(found)} | {_interval([r.area for r in found])} "
                    f"| {_interval([r.final for r in found])} | {max(r.largest for r in found):.3f} "
                    f"| {sum(collapsed(task, r) for r in found)} | {fmean(r.seconds for r in found):.0f} |"
                )
    return "\n".join(lines)


def best(results: Results, task: str) -> dict[str, str]:
    """Return the arm of each method that has the largest area at its best learning rate, mean over the seeds."""
    found: dict[str, str] = {}
    for family in FAMILIES:
        tuned = {}
        for arm in dict.fromkeys(s.arm for s in results if s.task == task and ARMS[s.arm].family == family):
            rates = {s.lr for s in results if (s.task, s.arm) == (task, arm)}
            tuned[arm] = max(fmean(r.area for r in _of(results, task, arm, lr)) for lr in rates)
        if tuned:
            found[family] = max(tuned, key=tuned.__getitem__)
    return found


def _of(results: Results, task: str, arm: str, lr: float) -> list[Result]:
    return [result for s, result in results.items() if (s.task, s.arm, s.lr) == (task, arm, lr)]


def collapsed(task: str, result: Result) -> bool:
    """Whether a run has lost what it had reached."""
    low, peak = TASKS[task].low, max(result.curve)
    return peak > low + 0.25 * (TASKS[task].high - low) and result.final - low < COLLAPSED * (peak - low)


def bounds(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean.

    >>> bounds([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def _interval(values: Sequence[float]) -> str:
    low, high = bounds(values)
    return f"{fmean(values):.0f} [{low:.0f}, {high:.0f}]"


def draw(results: Results, path: Path) -> None:
    """Area under the learning curve, and the final return, against the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(setting.task for setting in results))
    size = (9.5, 0.8 + 3.0 * len(tasks))
    figure, axes = pyplot.subplots(len(tasks), 2, figsize=size, squeeze=False, layout="constrained")
    for task, row in zip(tasks, axes, strict=True):
        for family, arm in best(results, task).items():
            for panel, figure_of in zip(row, ("area", "final"), strict=True):
                _line(panel, results, task, arm, figure_of, family)
        row[0].set_ylabel(f"{TASKS[task].env}\nreturn")
        row[0].set_title("mean over the run (area under the learning curve)", fontsize=9)
        row[1].set_title("at the end", fontsize=9)
        for panel in row:
            panel.set(xscale="log", xlabel="learning rate", ylim=(TASKS[task].low, None))
            panel.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle("Return against learning rate, each method at its best threshold", fontweight="bold")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _line(panel: Any, results: Results, task: str, arm: str, figure: str, family: str) -> None:
    rates = sorted({s.lr for s in results if (s.task, s.arm) == (task, arm)})
    values = [[getattr(r, figure) for r in _of(results, task, arm, lr)] for lr in rates]
    ends = [bounds(each) for each in values]
    style = {"color": COLOURS[family], "linewidth": 2.2 if family in ("step", "unread", "rate") else 1.3}
    panel.plot(rates, list(map(fmean, values)), marker="o", markersize=4, label=FAMILIES[family], **style)
    panel.fill_between(rates, *zip(*ends, strict=True), color=COLOURS[family], alpha=0.12, linewidth=0)
