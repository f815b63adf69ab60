"""The pictures of the report. Each says in its title what it shows, or what it asks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes

from step_optim import Action, Movement, StepRecord
from study.config import PRIMARY, Limit
from study.reporting.comparisons import draw_branches, draw_differences, draw_learning_rates, draw_outcomes
from study.reporting.evidence import Evidence, arm_of, condition_of, label
from study.reporting.figures import accepted_records, accepted_updates, shared
from study.reporting.forks import Forks
from study.reporting.mechanisms import by_seed
from study.reporting.style import GREY, SHOCK, drawn, logarithmic, look
from study.reporting.wording import number, percent
from study.traces import Run

KINDS = {False: ("without such a budget", GREY), True: ("under this budget", "#0072B2")}
"""Of runs, as the scatter of held-out movement tells them apart."""

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
    title = f"{_when(evidence, arm)} ({arm_of(arm).label})"
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
            "update t. Marks: proposals (largest KL / budget of the budgets that are named on the right),\n"
            "filled if controlled, with alpha; bar: what was committed; x: rejected"
            + ("; yellow: known shock. " if arm_of(arm).shocked else ". ")
            + f"Shown: seed {runs[0].seed}; percentages: all"
            + ("." if len({run.seed for run in runs}) == 1 else ", or the first that ran.")
        )
    return title


def _when(evidence: Evidence, arm: str) -> str:
    """In a sentence, over all seeds."""
    runs = [run for run in evidence.whole_runs if run.arm == arm and run.condition in evidence.limited(arm)]
    acted: dict[bool, list[bool]] = {}
    for run in runs:
        for record, update in zip(run.records, run.updates, strict=True):
            acted.setdefault(bool(update["shock"]), []).append(record.triggered)
    shares = {shock: percent(fmean(triggered)) for shock, triggered in acted.items()}
    if True in shares and False in shares:
        return f"Controllers acted at {shares[True]} of the shocks, and {shares[False]} of the other updates"
    return f"Controllers acted on {next(iter(shares.values()))} of their updates"


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
    name = label(run.condition).replace(", ", ",\n")
    limits = condition_of(run.condition).limits
    budgets = {(): "no budget (both shown)", ("mean",): "budget: mean", ("slices",): "budget: slices"}
    axes.text(1.01, 0.62, name, color=colour, transform=axes.transAxes, va="center")
    text = budgets.get(limits, "budgets: mean, slices")
    axes.text(1.01, 0.12, text, color=GREY, transform=axes.transAxes, va="center", fontsize=9)


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
    """Scatter: every accepted update, on the control set and on the held-out prompts of the same slices."""
    if not any(accepted_records(run) for run in evidence.whole_runs):
        return ""
    found = by_seed(evidence, "ratio_mean")
    times = number(1 + (found.mean or 0.0))
    title = f"On the slices that both have, held-out prompts move {times} times as far as the control set"
    with drawn(path, 5.6, ncols=2) as (figure, axes):
        figure.suptitle(title, fontweight="bold")
        _scatter(axes[0, 0], evidence, "mean", evidence.study.budget_mean)
        _scatter(axes[0, 1], evidence, "slices", evidence.study.budget_slices)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, markerscale=1.6)
    return title


def _scatter(axes: Axes, evidence: Evidence, limit: Limit, budget: float) -> None:
    pairs = {limited: _pairs(evidence, limit, limited=limited) for limited in KINDS}
    for limited, (name, colour) in KINDS.items():
        x, y = [pair[0] for pair in pairs[limited]], [pair[1] for pair in pairs[limited]]
        axes.plot(x, y, "o", color=colour, markersize=4, alpha=0.5, markeredgewidth=0, label=name)
    every = [kl for found in pairs.values() for pair in found for kl in pair] or [budget]
    low, high = min(every) / 1.3, max(every) * 1.3
    axes.plot([low, high], [low, high], color="black", linewidth=1)
    axes.annotate("1:1", (high, high), xytext=(-4, -36), textcoords="offset points", ha="right")
    for line in (axes.axvline, axes.axhline):
        line(budget, color=GREY, linestyle=":", linewidth=1)
    axes.annotate(f"budget {budget:g}", (budget, low), xytext=(4, 4), textcoords="offset points", color=GREY)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    for which in "xy":
        logarithmic(axes, which)
    beyond = f"{sum(held > budget for _, held in pairs[True])} of {len(pairs[True])}"
    what = "All prompts" if limit == "mean" else "The worst slice"
    axes.set_title(f"{what}: {beyond} updates under a budget\nexceed it on held-out prompts", fontsize=11)
    axes.set_xlabel("KL of an update, control set [nats/token]")
    axes.set_ylabel("KL of it, held-out prompts [nats/token]")


def _pairs(evidence: Evidence, limit: Limit, *, limited: bool) -> list[tuple[float, float]]:
    """Control and held-out KL of the accepted updates of runs with, or without, that budget."""
    found = []
    for run in evidence.whole_runs:
        if (limit in condition_of(run.condition).limits) is limited:
            for record, update in zip(accepted_records(run), accepted_updates(run), strict=True):
                control, held = record.accepted, shared(update["held"], record.accepted)
                pair = (control.mean, held.mean) if limit == "mean" else (control.worst[1], held.worst[1])
                if min(pair) > 0:
                    found.append(pair)
    return found
