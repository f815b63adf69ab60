"""A log as columns: what is drawn of a run, without an object for every step."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from step_optim.telemetry.log import read_lines
from step_optim.telemetry.summary import OWN, PHASES

FIGURES = (
    "candidate",
    "accepted",
    "budget",
    "alpha",
    "progress",
    "audits",
    "drift",
    "cap",
    "held_out",
    "held_out_drift",
    "update_norm",
    "reward",
    *PHASES,
    "elapsed",
)
"""Columns of a run, one figure a step; NaN where it was not measured. KL in nats per token, phases in seconds."""

SIGNATURE = ("candidate", "accepted", "alpha", "drift", "update_norm", "reward")
"""What a condition of a study can change: what moved, what was decided, what it earned."""

SLICED = ("candidate", "accepted", "budget", "drift", "cap")
"""Columns of every slice."""


class _Row(NamedTuple):
    step: int
    action: str
    triggered: bool
    limited: bool
    bound: str | None
    figures: tuple[float, ...]
    """In the order of `FIGURES`."""
    slices: tuple[Mapping[str, Any], ...]
    """In the order of `SLICED`: values by slice."""
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """What happened in the T steps of a run."""

    header: Mapping[str, Any]
    """Of the latest segment of the log."""
    step: Tensor
    """[T] step indices, ascending."""
    action: Sequence[str]
    """T of them."""
    triggered: Tensor
    """[T] whether the candidate was infeasible."""
    limited: Tensor
    """[T] whether any budget was finite."""
    bound: Sequence[str | None]
    """The constraint with the largest KL / budget at the candidate of each step."""
    figures: Mapping[str, Tensor]
    """[T] each, float64, by name of `FIGURES`."""
    slices: Mapping[str, Tensor]
    """[T, S] each, float64, by name of `SLICED`."""
    names: tuple[str, ...]
    """The S slices."""
    notes: Mapping[int, Mapping[str, Any]]
    """By step index, what the training loop noted, where it did."""

    @property
    def path(self) -> Tensor:
        """Path length: the sum of accepted movements up to each step, [T] nats per token."""
        return _path(self.figures["accepted"])

    @property
    def slice_paths(self) -> Tensor:
        """Path length by slice, [T, S] nats per token."""
        return _path(self.slices["accepted"])

    @property
    def own_seconds(self) -> Tensor:
        """Seconds of each step that a bare optimizer does not take, [T]."""
        return torch.stack([self.figures[name] for name in OWN]).nan_to_num(0.0).sum(0)

    @property
    def overhead_share(self) -> float:
        """Share of the time between two steps that snapshots, audits and searches take; NaN if no time is known."""
        elapsed, own = self.figures["elapsed"], self.own_seconds
        known = ~elapsed.isnan()
        total = float(elapsed[known].sum())
        return float(own[known].sum()) / total if total else math.nan

    def same_trace(self, other: Columns) -> bool:
        """Whether two runs agree in every step, figure and decision; times and budgets are left out."""
        if self.names != other.names or list(self.action) != list(other.action) or not _same(self.step, other.step):
            return False
        mine = [*(self.figures[name] for name in SIGNATURE), *(self.slices[n] for n in SIGNATURE if n in self.slices)]
        its = [*(other.figures[name] for name in SIGNATURE), *(other.slices[n] for n in SIGNATURE if n in other.slices)]
        return all(map(_same, mine, its))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _path(accepted: Tensor) -> Tensor:
    return accepted.nan_to_num(0.0, 0.0, 0.0).cumsum(0)


def read_columns(path: str | Path) -> Columns:
    """Read a log; see `read_trace`.

    Raises:
        ValueError: as `read_trace`; or a log without records.
    """
    header: Mapping[str, Any] = {}
    table = _Table()
    for segment, row in read_lines(path, _row, fast=True):
        if row is None:
            header = segment
            continue
        if table.steps and row.step <= table.steps[-1]:
            table.cut(row.step)
        table.append(row)
    if not table.steps:
        raise ValueError(f"{path} has no records: a run that logged nothing cannot be shown")
    return table.columns(header)


class _Table:
    """Rows that were read so far, as plain numbers: a log may have a hundred thousand."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._actions: list[str] = []
        self._triggered: list[bool] = []
        self._limited: list[bool] = []
        self._bound: list[str | None] = []
        self._figures = array("d")
        self._notes: dict[int, Mapping[str, Any]] = {}
        self._names: list[str] = []
        self._slices = [array("d") for _ in SLICED]
        """Values of each kind, a row of all slices for each step."""

    def append(self, row: _Row) -> None:
        """Add a step."""
        for measured in row.slices[:2]:
            if [*measured] != self._names:
                self._widen([name for name in measured if name not in self._names])
        self.steps.append(row.step)
        self._actions.append(row.action)
        self._triggered.append(row.triggered)
        self._limited.append(row.limited)
        self._bound.append(row.bound)
        self._figures.extend(row.figures)
        if row.notes:
            self._notes[row.step] = row.notes
        for known, values in zip(self._slices, row.slices, strict=True):
            if [*values] == self._names:
                known.extend(map(float, values.values()))
            else:
                known.extend(float(values.get(name, math.nan)) for name in self._names)

    def _widen(self, new: list[str]) -> None:
        """Give slices that come up later a place in the rows before."""
        if not new:
            return
        width, more = len(self._names), [math.nan] * len(new)
        for i, known in enumerate(self._slices):
            rows = (known[start : start + width] for start in range(0, len(self.steps) * width, width or 1))
            wide = array("d")
            for row in rows if width else (array("d") for _ in self.steps):
                wide.extend(row)
                wide.extend(more)
            self._slices[i] = wide
        self._names += new

    def cut(self, step: int) -> None:
        """Drop this step and all after it."""
        stay = bisect_left(self.steps, step)
        self._notes = {known: notes for known, notes in self._notes.items() if known < step}
        for column in (self.steps, self._actions, self._triggered, self._limited, self._bound):
            del column[stay:]
        del self._figures[stay * len(FIGURES) :]
        for known in self._slices:
            del known[stay * len(self._names) :]

    def columns(self, header: Mapping[str, Any]) -> Columns:
        """Return all of them."""
        count, width = len(self.steps), len(self._names)
        figures = _tensor(self._figures).view(count, len(FIGURES)).T
        return Columns(
            header=header,
            step=torch.tensor(self.steps, device="cpu"),
            action=self._actions,
            triggered=torch.tensor(self._triggered, device="cpu"),
            limited=torch.tensor(self._limited, device="cpu"),
            bound=self._bound,
            figures=dict(zip(FIGURES, figures, strict=True)),
            slices={
                kind: _tensor(values).view(count, width) for kind, values in zip(SLICED, self._slices, strict=True)
            },
            names=tuple(self._names),
            notes=self._notes,
        )


def _tensor(values: array[float]) -> Tensor:
    if not values:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    return torch.frombuffer(values, dtype=torch.float64).clone()


def _row(plain: Mapping[str, Any]) -> _Row:
    candidate, accepted, limits = plain["candidate"], plain["accepted"], plain["budget"]
    drift = plain.get("reference_drift") or {}
    held, held_drift = plain.get("held_out") or {}, plain.get("held_out_drift") or {}
    seconds = plain.get("seconds", {})
    cap = limits.get("drift", limits.get("reference", math.inf))  # its name in older logs
    caps = limits.get("drift_slices", {})
    whole = (limits["mean"], cap, limits.get("prompt", math.inf), limits.get("token", math.inf))
    moved = plain["action"] != "unchanged"
    figures = (
        candidate["mean"],
        accepted["mean"],
        limits["mean"],
        plain.get("alpha"),
        plain.get("progress"),
        moved + len(plain.get("trials", ())),
        drift.get("mean"),
        cap,
        held.get("mean"),
        held_drift.get("mean"),
        plain.get("update_norm"),
        plain.get("reward"),
        *(seconds.get(name) for name in (*PHASES, "elapsed")),
    )
    return _Row(
        int(plain["step"]),
        str(plain["action"]),
        bool(plain.get("triggered", False)),
        any(float(limit) < math.inf for limit in (*whole, *limits["slices"].values(), *caps.values())),
        plain.get("bound"),
        tuple(_figures(figures)),
        (
            candidate["slices"],
            accepted["slices"],
            limits["slices"],
            drift.get("slices", {}),
            caps,
        ),
        plain.get("notes") or {},
    )


def _figures(values: Iterable[Any]) -> Iterable[float]:
    return (math.nan if value is None else float(value) for value in values)
