"""The table and the picture: what was learned, against how far the model moved elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from steering.arms import CAP, arm_of
from steering.run import Result, Setting

COLOURS = {
    "bare": "#555555",
    "shrink": "#D55E00",
    "steer": "#0072B2",
    "steer_pull": "#009E73",
    "steer_penalty": "#E69F00",
    "steer_control": "#56B4E9",
}
PENALTY = "#CC79A7"
PENALTIES = {"penalty_0.3": ":", "penalty_1": "--", "penalty_3": "-"}
"""Lines of the penalties."""

Results = Mapping[Setting, Result]


def table(results: Results) -> str:
    """One line for each task, arm and learning rate: means over the seeds that were run."""
    columns = (
        *("task", "arm", "lr", "seeds", "NLL", "exact", "drift (largest)", "held out", "worst slice"),
        *("rejected at the cap", "corrections, audits a step", "progress"),
    )
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for task, arm, lr in dict.fromkeys((s.task, s.arm, s.lr) for s in results):
        found = [result for s, result in results.items() if (s.task, s.arm, s.lr) == (task, arm, lr)]
        rejected, at_cap = sum(r.rejected for r in found), sum(r.at_cap for r in found)
        lines.append(
            f"| {task} | {arm_of(arm).label} | {lr:g} | {len(found)} | {fmean(r.nll for r in found):.3f} "
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
    size = (1.6 + 5.2 * len(tasks), 4.4)
    figure, axes = pyplot.subplots(1, len(tasks), figsize=size, squeeze=False, layout="constrained")
    for task, panel in zip(tasks, axes[0], strict=True):
        for arm in dict.fromkeys(setting.arm for setting in results if setting.task == task):
            points = []
            for lr in sorted({s.lr for s in results if (s.task, s.arm) == (task, arm)}):
                found = [r for s, r in results.items() if (s.task, s.arm, s.lr) == (task, arm, lr)]
                points.append((fmean(r.held_out for r in found), fmean(r.nll for r in found)))
            style = {"color": COLOURS.get(arm, PENALTY), "linewidth": 2.4 if arm in ("steer", "steer_pull") else 1.2}
            if arm in PENALTIES:
                style["linestyle"] = PENALTIES[arm]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=5, label=arm_of(arm).label, **style)
        panel.axvline(CAP, color="black", linewidth=1, linestyle="--")
        panel.annotate(
            f"cap {CAP:g}", (CAP, 0), xycoords=("data", "axes fraction"), xytext=(3, 5), textcoords="offset points"
        )
        panel.set(xscale="log", yscale="log", xlabel="held-out drift [nats per token]")
        panel.set_title(f"{task}: a point for each learning rate, {_rates(results)}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("test NLL of the task [nats per token]")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle("What was learned, and how far the model moved elsewhere", fontweight="bold")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _rates(results: Results) -> str:
    return ", ".join(f"{lr:g}" for lr in sorted({setting.lr for setting in results}))
