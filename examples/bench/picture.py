"""The picture of a run: overhead by method, audits by search, cost curves."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no window, wherever this runs

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

# Blue, vermilion and grey stay apart for colour-blind readers.
STEP, NAIVE, TODAY = "#0072B2", "#D55E00", "#777777"
TITLES = {
    "prompts": "Cost over the control set",
    "vocabulary": "over the vocabulary (small random body)",
    "parameters": "over the model (random)",
}
CURVES = {
    "prompts": "control prompts",
    "vocabulary": "vocabulary [tokens]",
    "parameters": "parameters",
}


def draw(result: dict[str, Any], path: Path) -> bool:
    """Write the picture to ``path``; False if nothing that it shows was measured."""
    sections = result["sections"]
    rows = [names for names in (("step", "search"), ("curves",)) if any(name in sections for name in names)]
    if not rows:
        return False
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        layout = [["step"] * 3 + ["search"] * 3 if row[0] == "step" else _curve_row() for row in rows]
        figure, axes = plt.subplot_mosaic(layout, figsize=(13, 5 * len(rows)), layout="constrained")
        figure.suptitle(f"{result['model']}, {result['machine']['device']}", fontsize=10, color="dimgrey")
        _fill(axes, sections)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return True


def _curve_row() -> list[str]:
    return [name for name in CURVES for _ in range(2)]


def _fill(axes: dict[str, Axes], sections: dict[str, Any]) -> None:
    """Draw what was measured, and leave the rest blank."""
    for name, panel in axes.items():
        if name == "step" and "step" in sections:
            draw_overheads(panel, sections["step"]["lora"]["methods"])
        elif name == "search" and "search" in sections:
            draw_searches(panel, sections["search"]["searches"])
        elif name in sections.get("curves", {}) and sections["curves"][name]:
            draw_curve(panel, sections["curves"][name], CURVES[name], legend=name == "prompts")
            panel.set_title(TITLES[name])
        else:
            panel.axis("off")


def colour(method: str) -> str:
    """Whose method it is."""
    return STEP if method.startswith("STEP") else NAIVE if method.startswith("naive") else TODAY


def draw_overheads(axes: Axes, methods: dict[str, Any]) -> None:
    """Bars: what a step costs beyond the bare one."""
    shown = {name: row["overhead"]["median"] for name, row in methods.items() if name not in ("bare", "forward")}
    names, values = list(shown), [max(value, 1e-2) for value in shown.values()]
    bars = axes.barh(names, values, color=[colour(name) for name in names])
    labels = axes.bar_label(bars, [f"{value:.2f}" for value in shown.values()], padding=4, fontsize=10)
    for label in labels:
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.axvline(1, color="black", linestyle=":", linewidth=1.2, zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(min(0.1, 0.7 * min(values)), 2.5 * max(values))
    _plain_numbers(axes)
    axes.invert_yaxis()
    axes.set_xlabel("(step - bare step) / one plain control forward (dotted), log scale")
    axes.set_title(
        f"A LoRA step that is committed costs {shown['STEP commit']:.2f} plain control\n"
        f"forwards more than a bare one; {shown['naive commit']:.2f} if done naively"
    )


def draw_searches(axes: Axes, searches: dict[str, Any]) -> None:
    """Bars: audits per trigger, with the largest number as a mark."""
    names, means = list(searches), [row["mean"] for row in searches.values()]
    bars = axes.barh(names, means, color=[STEP if name.startswith("model") else TODAY for name in names])
    notes = [f"{row['mean']:.2f}  (alpha: {row['within']:.0%})" for row in searches.values()]
    largest = max(row["max"] for row in searches.values())
    for bar, note, row in zip(bars, notes, searches.values(), strict=True):
        y = bar.get_y() + bar.get_height() / 2
        axes.plot(row["max"], y, "|", color="black", markersize=14, markeredgewidth=1.8)
        axes.annotate(note, (row["max"], y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set_xlim(0, 1.5 * largest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    axes.set_xlabel(
        "audits beyond the candidate's: mean (bar), largest (mark)\n(in brackets: alpha within 1 % of the best)"
    )
    default = next(iter(searches))
    axes.set_title(
        f"Over budget, {searches[default]['mean']:.1f} more audits find\n"
        f"alpha to 1 %; {searches['bisect']['mean']:.1f} by bisection"
    )


def draw_curve(axes: Axes, points: list[dict[str, Any]], label: str, *, legend: bool) -> None:
    """Lines: the overhead of a committed step over one size."""
    for method, marker in (("STEP commit", "o"), ("naive commit", "s")):
        known = [(point["x"], point["overhead"][method]) for point in points if method in point["overhead"]]
        if not known:
            continue
        x, figures = zip(*known, strict=True)
        middle = [figure["median"] for figure in figures]
        off = [[f["median"] - f["low"] for f in figures], [f["high"] - f["median"] for f in figures]]
        axes.errorbar(x, middle, yerr=off, marker=marker, color=colour(method), capsize=3, label=method)
    axes.set_xscale("log", base=2 if label == CURVES["prompts"] else 10)
    axes.set_ylim(bottom=0)
    axes.axhline(1, color="black", linestyle=":", linewidth=1.2, zorder=0)
    axes.set_xticks(_apart([point["x"] for point in points]), minor=False)
    axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    if legend:
        axes.set_ylabel("(step - bare step) / plain control forward")
        axes.set_ylim(top=1.25 * axes.get_ylim()[1])
        axes.legend(frameon=False, loc="upper left")


def _apart(sizes: list[int]) -> list[int]:
    """Leave out sizes whose labels would run into that of the next one on a logarithmic axis."""
    near = math.log(max(sizes) / min(sizes)) / 10
    return [a for a, b in pairwise(sizes) if math.log(b / a) > near] + sizes[-1:]


def _plain_numbers(axes: Axes) -> None:
    """Plain decimals at 1, 2 and 5 of every decade, in place of powers of ten."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
