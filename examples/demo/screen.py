"""What the demo shows while it runs: a live table on a terminal, one plain line per update anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from demo.report import RUNS, SHOCK, WITH, Limits

if TYPE_CHECKING:
    from step_optim import StepRecord

ACTION_COLOURS = {"commit": "green", "shrink": "yellow", "project": "yellow", "reject": "red", "unchanged": "dim"}
BAR_CELLS, BAR_BUDGET = 12, 4
"""Width of the bar, and how many of its cells are one budget."""
LINES_AROUND_TABLE = 7


class Screen:
    """Keeps time and prints plain lines; `LiveScreen` draws instead."""

    def __init__(self, console: Console, updates: int, limits: Limits) -> None:
        self.console, self.updates, self.limits = console, updates, limits
        self.rows: list[tuple[str, int, StepRecord]] = []
        """(run, update, record) of every finished update."""
        self._started: dict[str, float] = {}
        self._finished: dict[str, tuple[int, float]] = {}

    def __enter__(self) -> Screen:
        """Start drawing, where anything is drawn."""
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Leave the terminal as it was."""
        self.close()

    def close(self) -> None:
        """Stop drawing; what was drawn stays."""

    def say(self, text: str) -> None:
        """Tell about something that takes long."""
        self.console.print(text, highlight=False)

    def working(self, run: str, what: str) -> None:
        """Say what a run is doing."""
        if what.startswith("update"):  # loading does not count for the time left
            self._started.setdefault(run, time.monotonic())

    def show(self, run: str, response: str) -> None:
        """Show one of the responses that the policy just gave."""

    def update(self, run: str, number: int, record: StepRecord) -> None:
        """Show a finished update."""
        self.rows.append((run, number, record))
        self._finished[run] = number, time.monotonic()
        self._show_row(run, number, record)

    def seconds_left(self) -> float | None:
        """Return how long the slower run will still take, from the updates so far."""
        if not self._finished:
            return None
        return (
            max(
                when + (when - self._started[run]) / number * (self.updates - number)
                for run, (number, when) in self._finished.items()
            )
            - time.monotonic()
        )

    def _show_row(self, run: str, number: int, record: StepRecord) -> None:
        candidate, accepted, limits = record.candidate, record.accepted, self.limits
        alpha = "" if record.alpha is None else f" alpha {record.alpha:.2f}"
        name, kl = candidate.worst
        self.say(
            f"{run:12}  update {number:2}/{self.updates}  reward {record.reward:.2f}  "
            f"KL candidate {candidate.mean:.4f} accepted {accepted.mean:.4f} (budget {limits.mean:g})  "
            f"worst slice {name:5} {kl:.4f} (budget {limits.slices:g})  {record.action.value}{alpha}  "
            f"{clock(self.seconds_left() or 0)} left" + (f"  (learning rate x {SHOCK:g})" if shocked(record) else "")
        )


class LiveScreen(Screen):
    """A table that grows, the newest response, and what is going on."""

    def __init__(self, console: Console, updates: int, limits: Limits) -> None:
        super().__init__(console, updates, limits)
        self._doing: dict[str, str] = dict.fromkeys(RUNS, "starting")
        self._response: dict[str, str] = dict.fromkeys(RUNS, "")
        self._spinner = Spinner("dots")
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=5, vertical_overflow="crop")

    def __enter__(self) -> Screen:
        """Start drawing."""
        self._live.start(refresh=True)
        return self

    def close(self) -> None:
        """Stop drawing; what was drawn stays."""
        self._doing.clear()
        self._live.stop()

    def working(self, run: str, what: str) -> None:
        """Say what a run is doing."""
        super().working(run, what)
        self._doing[run] = what

    def show(self, run: str, response: str) -> None:
        """Show one of the responses that the policy just gave."""
        self._response[run] = " ".join(response.split())

    def _show_row(self, run: str, number: int, record: StepRecord) -> None:
        self._live.refresh()

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = [self._table()] if self.rows else []
        for run, what in self._doing.items():
            line = Text(f"{run}: {what}  ", no_wrap=True, overflow="ellipsis")
            if self._response[run]:
                line.append(f"“{self._response[run]}”", style="italic dim")
            parts.append(line)
        if self._doing:
            left = self.seconds_left()
            self._spinner.update(text="" if left is None else f"about {clock(left)} left")
            parts.append(self._spinner)
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(
            title=f"KL in nats per token; budget {self.limits.mean:g}, any slice {self.limits.slices:g}; "
            f"* learning rate x {SHOCK:g}",
            title_style="dim",
            title_justify="left",
            box=None,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for header, justify in (
            ("upd.", "right"),
            ("STEP", "left"),
            ("reward", "right"),
            ("candidate", "right"),
            ("accepted", "right"),
            ("of budget", "left"),
            ("worst slice", "left"),
            ("action", "left"),
            ("alpha", "right"),
        ):
            table.add_column(header, justify=justify, no_wrap=True)
        room = max(4, self.console.height - LINES_AROUND_TABLE)
        by_update = sorted(self.rows, key=lambda row: (row[1], RUNS.index(row[0])))
        for run, number, record in by_update[-room:]:
            table.add_row(*self._cells(run, number, record))
        return table

    def _cells(self, run: str, number: int, record: StepRecord) -> list[str | Text]:
        name, kl = record.candidate.worst
        over = "bold red" if self.limits.use(record.candidate) > 1 else ""
        return [
            f"{number}{'*' if shocked(record) else ''}" if run == WITH else "",
            run.split()[0],
            f"{record.reward:.2f}",
            Text(f"{record.candidate.mean:.4f}", style=over),
            f"{record.accepted.mean:.4f}",
            self._bar(record),
            f"{name:5} {kl:.3f}",
            Text(record.action.value, style=ACTION_COLOURS.get(record.action.value, "")),
            "" if record.alpha is None else f"{record.alpha:.2f}",
        ]

    def _bar(self, record: StepRecord) -> Text:
        """Draw what was committed solid, what was taken back hatched, and the budget as a mark."""
        accepted, candidate = (
            min(BAR_CELLS, round(self.limits.use(movement) * BAR_BUDGET))
            for movement in (record.accepted, record.candidate)
        )
        bar = Text()
        for cell in range(BAR_CELLS):
            if cell == BAR_BUDGET:
                bar.append("│", style="bold")
            if cell < accepted:
                bar.append("█", style="green" if cell < BAR_BUDGET else "red")
            else:
                bar.append("░" if cell < candidate else " ", style="yellow")
        return bar


def open_screen(updates: int, limits: Limits) -> Screen:
    """Return a live screen on a terminal, plain lines otherwise."""
    console = Console()
    kind: Callable[..., Screen] = LiveScreen if console.is_terminal else Screen
    return kind(console if console.is_terminal else Console(width=10_000), updates, limits)


def shocked(record: StepRecord) -> bool:
    """Whether the learning rate was wrong on purpose."""
    return record.notes.get("learning_rate_factor", 1) > 1


def clock(seconds: float) -> str:
    """Return minutes and seconds.

    >>> clock(75.2)
    '1:15'
    """
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes}:{rest:02}"
