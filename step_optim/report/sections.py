"""What a report shows of runs, chart by chart, and the axes that they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step_optim.report import charts
from step_optim.report.bins import Bins
from step_optim.report.figures import bounds, slices_at_the_end, worst_slice
from step_optim.telemetry.columns import Columns

ROOM = 1.05
"""Length of an axis over the largest figure on it."""

FAR = 20.0
"""Times what was committed, or its budget, up to which proposals have a place on the axis of movement."""


@dataclass(frozen=True)
class Section:
    """One kind of chart, of every run that has what it shows."""

    title: str
    text: str
    chart: Callable[[Columns], Any]
    """Of one run; None where it has nothing to show."""
    caption: Callable[[Columns], str] = lambda run: ""
    """What to see in it."""


def sections(runs: Sequence[Columns]) -> list[Section]:
    """The charts, with axes that all runs share."""
    moved = _top(column for run in runs for column in _within_reach(run))
    sliced = _top(run.slices["candidate"] for run in runs)
    drifted = _ends(column for run in runs for column in (run.figures["drift"], run.path, run.figures["cap"]))
    by_slice = _ends(column for run in runs for column in slices_at_the_end(run).values())
    held = _top(run.figures[name] for run in runs for name in ("held_out", "held_out_drift", "drift", "accepted"))
    most = _top(run.figures["audits"] for run in runs)
    slow = _top(Bins.of(len(run.action), charts.CELLS).mean(run.own_seconds) for run in runs)
    return [
        Section(
            "Movement of each step",
            "KL from the policy before the step: what was proposed (light), what was committed (blue), the budget "
            "(dashed). Marked: steps that were not committed as proposed. Square-root scale, as KL grows with the "
            "square of a step; what is beyond the axis is drawn at its end.",
            lambda run: charts.movement(run, moved),
            lambda run: f"Bound by: {bounds(run)}.",
        ),
        Section(
            "Slices",
            "What was proposed, by slice: the largest movement of each group of steps.",
            lambda run: charts.slices(run, sliced) if run.names else None,
            lambda run: f"Worst: {worst_slice(run)}.",
        ),
        Section(
            "What was kept of each step",
            "Alpha is the part of the update that was committed; progress the share of its first-order decrease of the "
            "loss.",
            charts.shares,
        ),
        Section("Triggered and rejected", "Shares of the last steps.", charts.rates),
        Section("Audits", "The candidate's, and those of the controller.", lambda run: charts.audits(run, most)),
        Section(
            "Drift against path length",
            "Drift is the KL from the policy at the start; path length the sum of all committed movements. Red: the "
            "cap. Logarithmic scale.",
            lambda run: charts.drift(run, drifted),
        ),
        Section(
            "Drift by slice",
            "At the end, on a logarithmic scale.",
            lambda run: charts.drift_by_slice(run, by_slice),
        ),
        Section(
            "Held-out prompts",
            "Prompts that decide nothing, beside the control set: lines that lie on each other say that the budgets "
            "carry to other prompts.",
            lambda run: charts.held_out(run, held),
        ),
        Section(
            "Overhead",
            "Seconds a step that the bare optimizer does not take.",
            lambda run: charts.overhead(run, slow),
            lambda run: "" if math.isnan(run.overhead_share) else f"{run.overhead_share:.1%} of the time.",
        ),
    ]


def _within_reach(run: Columns) -> Iterable[Tensor]:
    """What sets the movement axis: what was committed, budgets, and candidates up to `FAR` times as far."""
    reach = max(
        (
            float(column[column.isfinite()].max())
            for column in (run.figures["accepted"], run.figures["budget"])
            if bool(column.isfinite().any())
        ),
        default=0.0,
    )
    candidate = run.figures["candidate"]
    yield torch.tensor([reach], device="cpu")
    yield candidate.clamp_max(FAR * reach) if reach > 0 else candidate


def _top(columns: Iterable[Tensor]) -> float:
    """The end of an axis on which all finite figures have a place."""
    found = [float(column[column.isfinite()].max()) for column in columns if bool(column.isfinite().any())]
    return ROOM * max(found, default=0.0) or 1.0


def _ends(columns: Iterable[Tensor]) -> tuple[float, float]:
    """The ends of a logarithmic axis on which all finite figures above 0 have a place."""
    found = [column[column.isfinite() & (column > 0)] for column in columns]
    known = torch.cat([column.flatten() for column in found])
    if not len(known):
        return 0.1, 1.0
    return float(known.min()) / 1.2, 1.2 * float(known.max())
