"""The table and the picture: what was learned, against how far the model moved elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from steering.arms import ARMS, CAP
from steering.run import Result, Setting

COLOURS = {"bare": "#555555", "shrink": "#D55E00", "steer": "#0072B2", "steer_control": "#56B4E9"}
PENALTY = "#CC79A7"

Results = Mapping[Setting, Result]


def table(results: Results) -> str:
    """One line for each task, arm and learning rate: means over the seeds."""
    columns = (
        *("task", "arm", "lr", "NLL", "exact", "drift (largest)", "held out", "worst slice"),
        *("rejected at the cap", "corrections, audits a step", "progress"),
    )
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for task, arm, lr in dict.fromkeys((s.task, s.arm, s.lr) for s in results):
        found = [result for s, result in results.items() if (s.task, s.arm, s.lr) == (task, arm, lr)]
        rejected, at_cap = sum(r.rejected for r in found), sum(r.at_cap for r in found)
        lines.append(
            f"| {task} | {ARMS[arm].label} | {lr:g} | {fmean(r.nll for r in found):.3f} "
            f"| {fmean(r.exact for r in found):.2f} | {fmean(r.drift for r in found):.3f} "
            f"({max(r.largest for r in found):.4f}) | {fmean(r.held_out for r in found):.3f} "
            f"| {max(r.worst for r in found):.3f} | {rejected} of {at_cap} "
            f"| {fmean(r.corrections for r in found):.1f}, {fmean(r.audits for r in found):.1f} "
            f"| {fmean(r.progress for r in found):.2f} |"
        )
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Task NLL against held-out drift; every arm a line over the learning rates, the cap a wall."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(setting.task for setting in results))
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 4.2), squeeze=False, layout="constrained")
    for task, panel in zip(tasks, axes[0], strict=True):
        for arm in dict.fromkeys(setting.arm for setting in results if setting.task == task):
            points = []
            for lr in sorted({s.lr for s in results if (s.task, s.arm) == (task, arm)}):
                found = [r for s, r in results.items() if (s.task, s.arm, s.lr) == (task, arm, lr)]
                points.append((fmean(r.held_out for r in found), fmean(r.nll for r in found)))
            style = {"color": COLOURS.get(arm, PENALTY), "linewidth": 2.2 if arm == "steer" else 1.2}
            panel.plot(*zip(*points, strict=True), "o-", markersize=5, label=ARMS[arm].label, **style)
        panel.axvline(CAP, color="black", linewidth=1, linestyle="--")
        panel.annotate(
            f"cap {CAP:g}", (CAP, 1), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points"
        )
        panel.set(xscale="log", yscale="log", title=f"task: {task}", xlabel="held-out drift [nats per token]")
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("test NLL of the task [nats per token]")
    axes[0, -1].legend(fontsize=8, frameon=False)
    figure.suptitle("What was learned, and how far the model moved on other prompts", fontweight="bold")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
