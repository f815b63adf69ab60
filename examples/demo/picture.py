"""The demo's picture: KL against the budget, reward and drift, over the updates of both runs."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no window, wherever this runs

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from demo.report import SHOCK, Limits, RunResult, describe
from step_optim import StepRecord

# Blue and vermilion stay apart for colour-blind readers, and in grey.
COLOURS = ("#0072B2", "#D55E00")
SHOCK_COLOUR = "#F5E9A8"
MARKERS = {"commit": "o", "shrink": "v", "project": "D", "reject": "X", "unchanged": "s"}
OFFSET = 0.1
"""How far the two runs stand beside each other, in updates."""


def draw(runs: list[RunResult], limits: Limits, shock_at: int, path: Path) -> None:
    """Write the picture to ``path``."""
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (top, middle, bottom) = plt.subplots(
            3, 1, sharex=True, figsize=(9, 10), height_ratios=(2.4, 1, 1), layout="constrained"
        )
        figure.suptitle("PPO updates of a language model, with and without STEP", fontweight="bold")
        draw_movement(top, runs, limits)
        # The run without STEP is the wider line below, so that both show where they agree.
        for run, colour, width in reversed([*zip(runs, COLOURS, (1.5, 4.0), strict=True)]):
            middle.plot(run.rewards, "o-", color=colour, linewidth=width, markersize=3 + width)
            bottom.plot(run.drifts, "o-", color=colour, linewidth=width, markersize=3 + width)
        label(top, middle, bottom)
        for axes in (top, middle, bottom):
            mark_shock(axes, shock_at)
            axes.grid(axis="y", alpha=0.25)
        figure.legend(handles=legend(runs, shock_at), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def draw_movement(axes: Axes, runs: list[RunResult], limits: Limits) -> None:
    """Draw proposed (hollow) and committed (filled) movement, a stem up to the worst slice, and the budgets."""
    for run, colour, side in zip(runs, COLOURS, (-OFFSET, OFFSET), strict=True):
        for update, record in enumerate(run.records, 1):
            x, marker = update + side, MARKERS[record.action.value]
            proposed, committed, worst = record.candidate.mean, record.accepted.mean, record.accepted.worst[1]
            axes.plot(x, proposed, marker, mfc="white", mec=colour, mew=1.6, markersize=9, zorder=3)
            if committed > 0:  # a rejected update moved nothing, and zero has no place on a log axis
                axes.plot([x, x], [committed, worst], color=colour, linewidth=1.2, alpha=0.7)
                axes.plot(x, worst, "_", color=colour, markersize=9, mew=1.6)
                axes.plot(x, committed, marker, color=colour, markersize=9, zorder=4)
            if record.triggered:
                draw_control(axes, x, record, colour)
    axes.set_yscale("log")
    for kl, name, style in ((limits.mean, "mean", "--"), (limits.slices, "any slice", ":")):
        axes.axhline(kl, color="black", linestyle=style, linewidth=1.3, zorder=1)
        axes.annotate(
            f"budget,\n{name}: {kl:g}", (1.01, kl), xycoords=("axes fraction", "data"), va="center", fontsize=9
        )


def draw_control(axes: Axes, x: float, record: StepRecord, colour: str) -> None:
    """Show how far a controlled update wanted to go in its worst slice, and what was made of it."""
    proposed, committed, wanted = record.candidate.mean, record.accepted.mean, record.candidate.worst[1]
    axes.plot([x, x], [proposed, wanted], color=colour, linewidth=1.2, alpha=0.7, zorder=2)
    axes.plot(x, wanted, "_", color=colour, markersize=9, mew=1.6)
    axes.annotate(describe(record), (x - 0.17, proposed), ha="right", va="center", color=colour, fontsize=9)
    if committed > 0:
        arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 7, "shrinkB": 4}
        axes.annotate("", (x - 0.17, committed), (x - 0.17, proposed), arrowprops=arrow)


def label(top: Axes, middle: Axes, bottom: Axes) -> None:
    """Name the axes."""
    top.set_ylabel("KL of one update on the control set\n[nats per token, log scale]")
    # Plain decimals at 1, 2 and 5 of every decade, in place of powers of ten.
    top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    top.yaxis.set_major_formatter(FuncFormatter(lambda kl, _: f"{kl:g}"))
    top.yaxis.set_minor_locator(plt.NullLocator())
    middle.set_ylabel("mean reward\n[long words / 4]")
    bottom.set_ylabel("drift from the first\npolicy [nats per token]")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("PPO updates done")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))


def mark_shock(axes: Axes, shock_at: int) -> None:
    """Shade the update with the wrong learning rate."""
    if shock_at:
        axes.axvspan(shock_at - 0.45, shock_at + 0.45, color=SHOCK_COLOUR, linewidth=0, zorder=0)


def legend(runs: list[RunResult], shock_at: int) -> list[Line2D | Patch]:
    """Explain every colour and every shape that occurs."""
    grey = {"color": "dimgrey", "linestyle": ""}
    entries: list[Line2D | Patch] = [
        Line2D([], [], color=colour, linewidth=4, label=run.name) for run, colour in zip(runs, COLOURS, strict=True)
    ]
    if shock_at:
        entries.append(Patch(color=SHOCK_COLOUR, label=f"learning rate {SHOCK:g} times too large"))
    entries.append(Line2D([], [], marker="o", mfc="white", mew=1.6, markersize=9, label="proposed", **grey))
    entries.append(Line2D([], [], marker="o", markersize=9, label="committed", **grey))
    entries.append(Line2D([], [], marker="_", mew=1.6, markersize=10, label="worst slice of either", **grey))
    seen = {record.action.value for run in runs for record in run.records} - {"commit"}
    return entries + [
        Line2D([], [], marker=MARKERS[action], markersize=9, label=f"controlled: {action}", **grey) for action in seen
    ]
