"""The figures of a run for a table, and what they say in a sentence."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step_optim.telemetry.columns import Columns

SHOWN, LONGEST = 12, 80
"""Items of a noted list that are shown, and characters of a text."""

ACTIONS = ("commit", "shrink", "steer", "project", "reject", "unchanged")


def figures(run: Columns) -> dict[str, str]:
    """What a table says of a run, by heading."""
    column, steps, counts = run.figures, len(run.action), Counter(run.action)
    acted = run.triggered
    drift = _last(column["drift"])
    return {
        "steps": f"{steps:,}",
        "actions": ", ".join(f"{counts[name]:,} {name}" for name in ACTIONS if counts[name]),
        "triggered": _share(int(acted.sum()), steps),
        "rejected": _share(counts["reject"], steps),
        "mean alpha of triggered steps": _number(column["alpha"][acted]),
        "mean progress": _number(column["progress"]),
        "audits a step": _number(column["audits"]),
        "movement accepted: mean": _number(column["accepted"]),
        "movement accepted: largest": _text(float(_finite(column["accepted"]).max())),
        "drift at the end": _text(drift),
        "path length": _text(float(run.path[-1])),
        "overhead": "-" if math.isnan(run.overhead_share) else f"{run.overhead_share:.1%} of the time",
    }


def bounds(run: Columns) -> str:
    """What bound the triggered steps, most frequent first."""
    finite = (run.figures["candidate"].isfinite() & ~run.slices["candidate"].isinf().any(1)).tolist()
    steps = zip(run.bound, finite, run.triggered.tolist(), strict=True)
    counts = Counter(bound if bound and known else "not finite" for bound, known, triggered in steps if triggered)
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common()) or "nothing"


def worst_slice(run: Columns) -> str:
    """Name the slice that was asked to move farthest, when, and how far over its budget."""
    moved = _finite(run.slices["candidate"])
    if moved.numel() == 0 or float(moved.max()) <= 0:
        return "no slice moved"
    position, place = divmod(int(moved.argmax()), len(run.names))
    kl, budget = float(moved[position, place]), float(run.slices["budget"][position, place])
    times = f", {kl / budget:.2g} times its budget" if 0 < budget < math.inf else ""
    lost = int((~run.figures["candidate"].isfinite()).sum())
    beside = f"; {lost:,} steps were not finite (crosses)" if lost else ""
    return f"{run.names[place]}: {kl:.3g} nats per token at step {int(run.step[position])}{times}{beside}"


def slices_at_the_end(run: Columns) -> dict[str, Tensor]:
    """Drift, path length and cap of each slice, [S] each: at the last step whose drift was measured."""
    measured = (~run.slices["drift"].isnan()).any(1).nonzero().flatten()
    last = int(measured[-1]) if len(measured) else len(run.action) - 1
    return {"drift": run.slices["drift"][last], "path length": run.slice_paths[last], "cap": run.slices["cap"][last]}


@dataclass(frozen=True)
class Moved:
    """One of the steps that were asked to move farthest."""

    step: int
    action: str
    candidate: str
    worst: str
    """The slice that would have moved farthest."""
    notes: str
    """What the training loop noted: the batch, say."""


def largest_steps(run: Columns, count: int = 8) -> list[Moved]:
    """The steps with the largest candidates, the largest first; what is not finite is larger than all."""
    candidate = run.figures["candidate"].nan_to_num(math.inf, math.inf)
    moved = torch.tensor([action != "unchanged" for action in run.action], device="cpu")
    order = (
        torch.where(moved, candidate, -1.0).sort(descending=True, stable=True).indices[: min(count, int(moved.sum()))]
    )
    found = []
    for position in order.tolist():
        slices = dict(zip(run.names, run.slices["candidate"][position].tolist(), strict=True))
        known = {name: kl for name, kl in slices.items() if not math.isnan(kl)}
        worst = max(known, key=known.__getitem__, default=None)
        step = int(run.step[position])
        notes = ", ".join(f"{name}: {_noted(value)}" for name, value in run.notes.get(step, {}).items())
        told = "-" if worst is None else f"{worst} {_text(known[worst])}"
        proposed = float(candidate[position])
        shown = _text(proposed) if proposed < math.inf else "not finite"
        found.append(Moved(step, run.action[position], shown, told, notes))
    return found


def _noted(value: Any) -> str:
    """A note, as much of it as a table has room for."""
    if isinstance(value, list):
        more = f" ... ({len(value):,} in all)" if len(value) > SHOWN else ""
        return " ".join(_noted(item) for item in value[:SHOWN]) + more
    text = str(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def _finite(column: Tensor) -> Tensor:
    return torch.where(column.isfinite(), column, 0.0)


def _last(column: Tensor) -> float:
    known = column[~column.isnan()]
    return float(known[-1]) if len(known) else math.nan


def _number(column: Tensor) -> str:
    known = column[column.isfinite()]
    return _text(float(known.mean()) if len(known) else math.nan)


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _share(count: int, of: int) -> str:
    return f"{count / of:.1%} ({count:,})"
