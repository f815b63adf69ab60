"""The pictures of the report. Each says in its title what it shows, or what it asks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

from comparisons import draw_branches, draw_differences, draw_learning_rates, draw_outcomes
from config import PRIMARY
from evidence import Evidence, arm_of, condition_of, label
from figures import accepted_records, accepted_updates, worst
from forks import Forks
from matplotlib.axes import Axes
from mechanisms import by_seed
from style import GREY, SHOCK, drawn, logarithmic, look
from traces import Run
from wording import number, percent

from step_optim import Action, Movement, StepRecord

Draw = Callable[[Path], str]
"""Writes a picture, and returns what it says; the empty string if there is nothing to show."""


def draw(evidence: Evidence, forks: Forks, out: Path) -> dict[str, str]:
    """Draw what there are data for, and return what each picture says, by the name of its file."""
    pictures: dict[str, Draw] = {
        "outcomes": partial(draw_outcomes, evidence, PRIMARY[0]),
        "differences": partial(draw_differences, evidence, PRIMARY[0]),
        **{
            f"activation_{arm}": partial(draw_activation, evidence, arm)
            for arm in evidence.arms
            if evidence.limited(arm)
        },
        "learning_rates": partial(draw_learning_rates, evidence),
        "branches": partial(draw_branches, forks),
        "held_out": partial(draw_held_out, evidence),
    }
    said = {name: picture(out / f"{name}.png") for name, picture in pictures.items()}
    return {name: text for name, text in said.items() if text}


def draw_activation(evidence: Evidence, arm: str, path: Path) -> str:
    """Strips: what every update proposed, in units of the budget, and what the controller made of it."""
    runs = [first_run(evidence, arm, condition) for condition in evidence.conditions(arm)]
    limited = [f for condition in evidence.limited(arm) for f in evidence.of(arm, condition).values()]
    share = percent(fmean(f.trigger_rate for f in limited))
    title = f"When did the controllers act? On {share} of their updates ({arm_of(arm).label})"
    with drawn(path, 1.6 + 0.95 * len(runs), nrows=len(runs), sharex=True, sharey=True) as (figure, axes):
        figure.suptitle(title, fontweight="bold")
        for run, panel in zip(runs, axes[:, 0], strict=True):
            _strip(panel, run, evidence)
        low, high = axes[0, 0].get_ylim()
        axes[0, 0].set_ylim(0.7 * min(low, 0.5), 2.5 * max(high, 2.0))  # room for alpha above the highest point
        for panel in axes[:, 0]:
            logarithmic(panel, "y")
            panel.set_yticks(_round_numbers(*panel.get_ylim()))
            panel.tick_params(axis="x", length=0)
        figure.supylabel("proposed KL / budget (log scale)", fontsize=11)
        axes[-1, 0].set_xlabel(
            "update t. Marks: proposals (largest KL / budget of the condition's budgets, of all if it has none),\n"
            "filled if controlled, with alpha; bar: what was committed; x: rejected; yellow: known shock. "
            f"Seed {runs[0].seed}" + ("" if len({run.seed for run in runs}) == 1 else ", or the first that ran") + "."
        )
    return title


def _round_numbers(low: float, high: float) -> list[float]:
    """Powers of ten and 1; on a short axis, what is halfway between them too."""
    ticks = (0.01, 0.1, 1, 10, 100) if high / low > 100 else (0.03, 0.1, 0.3, 1, 3, 10, 30)
    return [tick for tick in ticks if low < tick < high]


def first_run(evidence: Evidence, arm: str, condition: str) -> Run:
    """The run of the lowest seed."""
    runs = [run for run in evidence.whole_runs if (run.arm, run.condition) == (arm, condition)]
    return min(runs, key=lambda run: run.seed)


def _strip(axes: Axes, run: Run, evidence: Evidence) -> None:
    colour, _ = look(run.condition)
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":")
    for t, (record, update) in enumerate(zip(run.records, run.updates, strict=True)):
        if update["shock"]:
            axes.axvspan(t - 0.45, t + 0.45, color=SHOCK, zorder=0, linewidth=0)
        proposed, committed = (use(moved, run, evidence) for moved in (record.candidate, record.accepted))
        if not math.isfinite(proposed) or proposed <= 0:
            continue
        _decision(axes, t, record, proposed, committed, colour)
    axes.set_yscale("log")
    axes.set_xticks(range(len(run.records)))
    axes.text(1.01, 0.5, label(run.condition).replace(", ", ",\n"), color=colour, transform=axes.transAxes, va="center")


def _decision(axes: Axes, t: int, record: StepRecord, proposed: float, committed: float, colour: str) -> None:
    rejected = record.action is Action.REJECT
    fill = colour if record.triggered else "white"
    axes.plot(t, proposed, "X" if rejected else "o", mfc=fill, mec=colour, mew=1.3, markersize=7, zorder=3)
    if committed > 0 and record.triggered:
        axes.plot([t, t], [committed, proposed], color=colour, linewidth=1.2)
        axes.plot(t, committed, "_", color=colour, markersize=10, mew=2)
    if record.triggered and not rejected:
        text = "proj." if record.alpha is None else f"{record.alpha:.2f}"
        axes.annotate(text, (t, proposed), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9)


def use(moved: Movement, run: Run, evidence: Evidence) -> float:
    """Part of the budget that a movement uses: of the condition's budgets, or of all if it has none."""
    limits = condition_of(run.condition).limits or ("mean", "slices")
    ratios = {
        "mean": moved.mean / evidence.study.budget_mean,
        "slices": moved.worst[1] / evidence.study.budget_slices,
    }
    return max(ratios[limit] for limit in limits)


def draw_held_out(evidence: Evidence, path: Path) -> str:
    """Scatter: every accepted update, on the control set and on held-out prompts."""
    if not any(accepted_records(run) for run in evidence.whole_runs):
        return ""
    found = by_seed(evidence, "ratio_mean")
    title = f"Held-out prompts move {number(1 + (found.mean or 0.0))} times as far as the control set"
    with drawn(path, 5.6, ncols=2) as (figure, axes):
        figure.suptitle(title, fontweight="bold")
        for panel, worst_slice in zip(axes[0], (False, True), strict=True):
            _scatter(panel, evidence, worst_slice=worst_slice)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, markerscale=1.6)
    return title


def _scatter(axes: Axes, evidence: Evidence, *, worst_slice: bool) -> None:
    study = evidence.study
    every: list[float] = []
    names = dict.fromkeys(condition for arm in evidence.arms for condition in evidence.conditions(arm))
    for condition in names:
        x, y = _pairs(evidence, condition, worst_slice=worst_slice)
        colour, marker = look(condition)
        axes.plot(x, y, marker, color=colour, markersize=4, alpha=0.6, markeredgewidth=0, label=label(condition))
        every += [*x, *y]
    low, high = min(every) / 1.3, max(every) * 1.3
    axes.plot([low, high], [low, high], color="black", linewidth=1)
    axes.annotate("1:1", (high, high), xytext=(-4, -36), textcoords="offset points", ha="right")
    budget = study.budget_slices if worst_slice else study.budget_mean
    for line in (axes.axvline, axes.axhline):
        line(budget, color=GREY, linestyle=":", linewidth=1)
    axes.annotate(f"budget {budget:g}", (budget, low), xytext=(4, 4), textcoords="offset points", color=GREY)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    for which in "xy":
        logarithmic(axes, which)
    what = "worst slice" if worst_slice else "all prompts"
    axes.set_title(f"An accepted update, {what}")
    axes.set_xlabel("KL on the control set [nats/token]")
    axes.set_ylabel("KL on held-out prompts [nats/token]")


def _pairs(evidence: Evidence, condition: str, *, worst_slice: bool) -> tuple[list[float], list[float]]:
    """Control and held-out KL of the accepted updates of a condition."""
    x, y = [], []
    for run in (run for run in evidence.whole_runs if run.condition == condition):
        for record, update in zip(accepted_records(run), accepted_updates(run), strict=True):
            control, held = record.accepted, update["held"]
            pair = (control.worst[1], worst(held)) if worst_slice else (control.mean, held["mean"])
            if min(pair) > 0:
                x.append(pair[0])
                y.append(pair[1])
    return x, y
