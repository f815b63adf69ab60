"""How pictures look: one colour and one marker for each condition, in all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no window, wherever this runs

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from study.reporting import paired

WIDTH = 11.0
"""inches; with 11 points of text, readable at the width of a README"""
DPI = 110
SHOCK = "#F5E9A8"
"""behind updates whose learning rate is multiplied"""
GREY = "#666666"

# Okabe and Ito's palette, which colour-blind readers can tell apart; variants of one idea share a hue, and differ in
# shade and marker.
LOOKS: dict[str, tuple[str, str]] = {
    "fixed": ("#000000", "o"),
    "gate": ("#D55E00", "X"),
    "gate_keep": ("#F0A070", "P"),
    "gate_warm": ("#7F3700", "*"),
    "breaker": ("#CC79A7", "s"),
    "interpolate": ("#0072B2", "v"),
    "interpolate_warm": ("#8C6BB1", "^"),
    "interpolate_restore": ("#3F92C4", "P"),
    "project": ("#56B4E9", "D"),
    "ema": ("#009E73", "^"),
    "ratchet_cap": ("#66B89A", "<"),
    "ratchet": ("#00583F", ">"),
    "target_kl": ("#B8860B", "h"),
    "adaptive_kl": ("#E0B840", "p"),
}
BRANCHES = {
    "accept": "#000000",
    "shrink": "#0072B2",
    "shrink_restore": "#7FB2D6",
    "shrink_between": "#3F92C4",
    "project": "#56B4E9",
    "project_short": "#2F8FBF",
    "rerun": "#8C6BB1",
    "reject": "#D55E00",
    "reject_keep": "#F0A070",
}


def look(condition: str) -> tuple[str, str]:
    """Colour and marker of a condition; grey for one without."""
    return LOOKS.get(condition, (GREY, "o"))


@contextmanager
def drawn(path: Path, height: float, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """Make a figure of full width, and write it to ``path`` in the end."""
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained", squeeze=False, **subplots)
        yield figure, axes
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def row(axes: Axes, y: float, values: Sequence[float], colour: str, marker: str = "o", *, sure: bool = True) -> None:
    """Draw the values of a row as dots, with their mean and its bootstrap interval; hollow if that says nothing."""
    if not values:
        return
    axes.plot(values, [y + 0.22] * len(values), "o", color=colour, alpha=0.45, markersize=4, markeredgewidth=0)
    found = paired.mean_interval(values)
    if found is not None:
        axes.plot(found, [y, y], color=colour, linewidth=2.5, solid_capstyle="round")
    middle = sum(values) / len(values)
    axes.plot(middle, y, marker, mfc=colour if sure else "white", mec=colour, mew=1.6, markersize=8)


def rows_named(axes: Axes, names: Sequence[str], colours: Sequence[str]) -> None:
    """Name the rows from the top down, each in its colour."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    for text, colour in zip(axes.get_yticklabels(), colours, strict=True):
        text.set_color(colour)


def few_ticks(axes: Axes, count: int = 3) -> None:
    """Leave room between the numbers of a narrow panel."""
    axes.xaxis.set_major_locator(MaxNLocator(count))
    axes.grid(axis="x", alpha=0.25)


def logarithmic(axes: Axes, which: str) -> None:
    """Make an axis logarithmic, with plain decimals at powers of ten, or closer if it is short."""
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    steps = (1.0,) if high / low > 300 else (1.0, 3.0) if high / low > 15 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def named_beside(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Name points (x, y, name, colour) in a column right of the panel, in order and apart, with a thin line to each."""
    if not points:
        return
    low, high = axes.get_ylim()
    heights = _apart([(y - low) / (high - low) for _, y, _, _ in points], gap=0.062)
    for (x, y, name, colour), height in zip(points, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=10,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.8},
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights so far apart that names do not touch; their order stays.

    >>> _apart([0.5, 0.5], gap=0.1)
    [0.45, 0.55]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 1e-9:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
    result = [0.0] * len(placed)
    for i, height in zip(order, placed, strict=True):
        result[i] = round(height, 9)
    return result
