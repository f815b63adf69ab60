"""A run on a terminal, while it goes on: ``step-optim watch RUN.jsonl``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.report.follow import Follower
from step_optim.telemetry.record import StepRecord

COLOURS = {"commit": "green", "shrink": "yellow", "steer": "cyan", "project": "magenta", "reject": "bold red"}
"""Of actions; each is written out, too."""

BLOCKS = " ▁▂▃▄▅▆▇█"
"""Heights of a bar of one character."""

EVERY = 0.5
"""Seconds between two looks at the log."""


def watch(path: str | Path, *, console: Console | None = None, once: bool = False) -> None:
    """Show a run until it is interrupted; it may begin later, be killed, and be resumed.

    Args:
        path: of its log.
        console: where; by default the terminal. What is none gets the latest figures once.
        once: show what there is, and return.

    Raises:
        ValueError: the log cannot be read; or ``once``, and it is not there.
    """
    console, follower = console or Console(), Follower(path)
    if once or not console.is_terminal:
        if not follower.path.is_file():
            raise ValueError(f"there is no log {path}; without a terminal nothing can be waited for")
        follower.poll()
        console.print(view(follower, console.width, console.height))
        return
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            follower.poll()
            live.update(view(follower, console.width, console.height), refresh=True)
            time.sleep(EVERY)


def view(follower: Follower, width: int, height: int) -> RenderableType:
    """Everything that is shown, as large as the terminal is."""
    if not follower.records:
        return Text(f"waiting for {follower.path} ...")
    latest, records = follower.records[-1], follower.records
    bars = max(width - 24, 10)
    parts: list[RenderableType] = [_title(follower, latest), Text()]
    parts += [
        _bars(name, records[-bars:], of, top)
        for name, of, top in (
            ("candidate / budget", lambda record: _nearest(record.candidate, record.budget), 2.0),
            ("committed / budget", lambda record: _nearest(record.accepted, record.budget), 2.0),
            ("drift / cap", lambda record: _nearest_cap(record.reference_drift, record.budget), 1.0),
            ("alpha", lambda record: record.alpha, 1.0),
        )
    ]
    rest = max(height - len(parts) - 9, 3)
    return Group(*parts, Text(), _table(records[-rest:], width), Text(), _totals(follower.figures))


def _title(follower: Follower, latest: StepRecord) -> Text:
    resumed = f", resumed {follower.segments - 1} times" if follower.segments > 1 else ""
    text = Text(f"{follower.path}  step {latest.step}{resumed}", style="bold", no_wrap=True, overflow="ellipsis")
    for name in ("budget", "controller"):
        if name in follower.header:
            text.append(f"\n{name}: {follower.header[name]}", style="not bold dim")
    return text


def _bars(name: str, records: Sequence[StepRecord], of: Callable[[StepRecord], float | None], top: float) -> Text:
    """One character a step, as high as its figure; red where it is above 1."""
    text = Text(f"{name:>20}  ")
    for record in records:
        value = of(record)
        if value is None or math.isnan(value):
            text.append(" ")
            continue
        level = min(max(value / top, 0.0), 1.0)
        block = BLOCKS[max(round(level * (len(BLOCKS) - 1)), value > 0)]
        text.append(block, style="red" if value > 1 else "green")
    return text


def _nearest(moved: Movement, limits: Limits) -> float | None:
    """The largest movement over its budget: of the mean, a slice, the worst prompt or token; None if none has one."""
    tails = ((moved.prompt, limits.prompt), (moved.token, limits.token))
    return _highest([(moved.mean, limits.mean), *_by_slice(moved, limits.slices), *tails])


def _nearest_cap(drift: Movement | None, limits: Limits) -> float | None:
    if drift is None:
        return None
    return _highest([(drift.mean, limits.drift), *_by_slice(drift, limits.drift_slices)])


def _by_slice(moved: Movement, limits: Mapping[str, float]) -> list[tuple[float, float]]:
    return [(moved.slices.get(name, 0.0), limit) for name, limit in limits.items()]


def _highest(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    """The largest ratio to a budget; what is not finite is over every budget."""
    known = [(kl, limit) for kl, limit in pairs if kl is not None and limit < math.inf]
    ratios = [0.0 if kl == 0 else kl / limit if math.isfinite(kl) and limit > 0 else math.inf for kl, limit in known]
    return max(ratios, default=None)


def _table(records: Sequence[StepRecord], width: int) -> Table:
    """The latest steps, the newest first, with the columns that there is room for."""
    shown = [column for column in COLUMNS if width >= column.width]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in shown:
        table.add_column(column.name, justify=column.justify, no_wrap=True, overflow="ellipsis")
    for record in reversed(records):
        table.add_row(*(_cell(column.of(record)) for column in shown))
    return table


def _cell(value: str | Text) -> Text:
    """As it is: a slice's name may look like markup, or hold what a terminal would obey."""
    return value if isinstance(value, Text) else Text("".join(c if c.isprintable() else "?" for c in value))


def _action(record: StepRecord) -> Text:
    return Text(record.action.value, style=COLOURS.get(record.action.value, "dim"))


def _worst(record: StepRecord) -> str:
    name, kl = record.candidate.worst
    return f"{_number(kl)} {name}"


def _moved_away(record: StepRecord) -> str:
    return _number(None if record.reference_drift is None else record.reference_drift.mean)


def _totals(figures: dict[str, Any]) -> Text:
    rates = ", ".join(
        f"{told} {'-' if figures[name] is None else f'{figures[name]:.1%}'}"
        for told, name in (
            ("triggered", "trigger_rate"),
            ("rejected", "rejection_rate"),
            ("overhead", "overhead_share"),
        )
    )
    bound = ", ".join(f"{name} {count}" for name, count in figures["bound"].items()) or "nothing"
    return Text(f"{figures['steps']} steps: {rates}; bound by {bound}\nKL in nats per token", style="dim")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


@dataclass(frozen=True)
class Column:
    """Of the table of steps."""

    name: str
    of: Callable[[StepRecord], str | Text]
    width: int = 0
    """Of a terminal that has room for it."""
    justify: Literal["left", "right"] = "right"


COLUMNS = (
    Column("step", lambda record: str(record.step)),
    Column("action", _action, justify="left"),
    Column("candidate", lambda record: _number(record.candidate.mean)),
    Column("committed", lambda record: _number(record.accepted.mean)),
    Column("alpha", lambda record: _number(record.alpha)),
    Column("drift", _moved_away, width=64),
    Column("progress", lambda record: _number(record.progress), width=100),
    Column("reward", lambda record: _number(record.reward), width=100),
    Column("worst slice", _worst, width=72, justify="left"),
)
