"""Watching a run: the log is followed while it is written, and what is shown fits the terminal."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

from step_optim.__main__ import main
from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.report import terminal
from step_optim.report.follow import Follower
from step_optim.telemetry.log import JSONLWriter, read_log
from step_optim.telemetry.summary import summarise
from tests.report.test_report import log, record, run


def shown(path: Path, width: int = 120, height: int = 40) -> str:
    """What a terminal of that size shows, without colours."""
    follower = Follower(path)
    follower.poll()
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(terminal.view(follower, width, height))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_log_is_followed_line_by_line(tmp_path) -> None:
    """Before it is there, a torn line, more lines; and the figures are those of the whole."""
    path = tmp_path / "run.jsonl"
    follower = Follower(path)
    assert not follower.poll()
    text = log(tmp_path / "whole.jsonl", run()).read_text()
    for end in range(0, len(text), 700):
        path.write_text(text[:end])
        follower.poll()
        known = [json.loads(line)["step"] for line in text[:end].split("\n")[1:-1]]
        assert [each.step for each in follower.records] == known
    path.write_text(text)
    assert follower.poll()
    assert not follower.poll()
    assert [each.step for each in follower.records] == list(range(12))
    assert follower.figures == summarise(read_log(path))
    assert follower.header["controller"] == "Interpolate()"


def test_a_resumed_run_and_another_file(tmp_path) -> None:
    """Steps that are repeated replace the old ones; a file that begins anew is read anew."""
    path = log(tmp_path / "run.jsonl", run())
    follower = Follower(path)
    follower.poll()
    write = JSONLWriter(path, dict)
    write(record(5, 0.015))
    follower.poll()
    assert [each.step for each in follower.records] == [0, 1, 2, 3, 4, 5]
    assert (follower.records[-1].candidate.mean, follower.segments) == (0.015, 2)
    assert follower.figures == summarise(read_log(path))
    assert follower.figures["steps"] == 6
    assert "resumed 1 times" in shown(path)
    path.write_text("")
    log(path, run()[:2])
    follower.poll()
    assert ([each.step for each in follower.records], follower.segments) == ([0, 1], 1)


def test_long_runs_keep_what_a_terminal_has_room_for(tmp_path) -> None:
    follower = Follower(log(tmp_path / "run.jsonl", [record(i) for i in range(1000)]))
    follower.poll()
    assert len(follower.records) <= 800
    assert follower.figures["steps"] == 1000


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("height", [12, 24, 50])
def test_it_fits(tmp_path, width, height) -> None:
    """No line is longer than the terminal is wide; the newest step is there, with what became of it."""
    text = shown(
        log(tmp_path / "run.jsonl", [record(i, 0.04 if i % 5 == 4 else 0.01) for i in range(300)]), width, height
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 18)
    newest = next(line for line in lines if line.lstrip().startswith("299"))
    assert "shrink" in newest
    assert "0.04" in newest
    assert "triggered 20.0%" in text


def test_bars_are_of_the_constraint_that_is_nearest_to_its_budget(tmp_path) -> None:
    """Also where only a slice is limited; what is above 1 is as high as twice the budget."""
    moved = [Movement(0.01, {"a": kl}) for kl in (0.0, 0.025, 0.05, 0.2)]
    steps = [record(i, candidate=kl, budget=Limits(slices={"a": 0.05})) for i, kl in enumerate(moved)]
    bars = next(line for line in shown(log(tmp_path / "run.jsonl", steps)).splitlines() if "candidate /" in line)
    assert bars.rstrip().endswith("  ▂▄█")


@pytest.mark.parametrize(
    ("movement", "limits", "bar"),
    [
        ({"prompt": 0.09}, {"prompt": 0.03}, "█"),
        ({"token": 0.5}, {"token": 0.5}, "▄"),
        ({"slices": {"a": 0.1}, "mean": math.nan}, {"slices": {"a": 0.4}, "mean": 1.0}, "█"),
        ({"mean": 0.01}, {"mean": 0.0}, "█"),
        ({"mean": 0.01}, {}, ""),
    ],
)
def test_every_kind_of_budget_has_a_bar(tmp_path, movement, limits, bar) -> None:
    """Tails too; what is not finite is over every budget, and so is any movement over one of 0."""
    moved = Movement(**({"mean": 0.01, "slices": {}} | movement))
    path = log(tmp_path / "run.jsonl", [record(0, candidate=moved, budget=Limits(**limits))])
    (line,) = [line for line in shown(path).splitlines() if "candidate /" in line]
    assert line.partition("budget")[2].strip() == bar


def test_a_cap_of_a_slice_has_a_bar(tmp_path) -> None:
    drift = Movement(0.01, {"story": 0.06})
    path = log(
        tmp_path / "run.jsonl",
        [record(0, reference_drift=drift, budget=Limits(drift=1.0, drift_slices={"story": 0.05}))],
    )
    (line,) = [line for line in shown(path).splitlines() if "drift /" in line]
    assert line.partition("cap")[2].strip() == "█"


@pytest.mark.parametrize("name", ["[/b]", "[bold]x", ":smile: a", "\x1b[31mred", "a\u2028b"])
def test_names_are_shown_as_they_are(tmp_path, name) -> None:
    """They are no markup, and a terminal obeys none of them."""
    path = log(tmp_path / "run.jsonl", [record(0, candidate=Movement(0.01, {name: 0.02}), notes={"raw": name})])
    text = shown(path)
    assert "".join(c if c.isprintable() else "?" for c in name) in text
    assert "\x1b" not in text


def test_a_line_may_hold_what_others_end_lines_with(tmp_path) -> None:
    """Written by another program that leaves U+2028 as it is."""
    path = log(tmp_path / "run.jsonl", [record(0, notes={"text": "MARK"})])
    path.write_text(path.read_text().replace("MARK", "a\u2028b\u0085c"), encoding="utf-8")
    follower = Follower(path)
    follower.poll()
    assert len(follower.records) == len(read_log(path)) == 1


def test_figures_that_are_missing_or_not_finite(tmp_path) -> None:
    """A run that only measures has no budget to compare with."""
    steps = [
        replace(record(0), budget=Limits(), alpha=None, reference_drift=None, progress=None),
        replace(record(1), candidate=Movement(math.nan), accepted=Movement(0.0)),
    ]
    assert "nan" in shown(log(tmp_path / "run.jsonl", steps))


def test_a_terminal_goes_on_until_it_is_interrupted(tmp_path) -> None:
    """It waits for a log, and shows what comes."""
    path, console, looks = tmp_path / "run.jsonl", Console(file=io.StringIO(), force_terminal=True, width=120), []

    def sleep(_seconds: float) -> None:
        looks.append(console.file.getvalue())  # type: ignore[attr-defined]
        if len(looks) == 1:
            log(path, run()[:3])
        if len(looks) == 3:
            raise KeyboardInterrupt

    with mock.patch.object(terminal.time, "sleep", sleep), pytest.raises(KeyboardInterrupt):
        terminal.watch(path, console=console)
    assert "waiting for" in looks[0]
    assert "step 2" in looks[1]


def test_without_a_terminal_it_shows_the_latest_once(tmp_path, capsys) -> None:
    """As in a pipe; and says so where there is nothing yet, or what cannot be read."""
    path = log(tmp_path / "run.jsonl", run())
    assert main(["watch", str(path)]) == 0
    assert "12 steps" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "none.jsonl")]) == 2
    assert "there is no log" in capsys.readouterr().err
    path.write_text(path.read_text() + "no json\n")
    assert main(["watch", "--once", str(path)]) == 2
    assert "no JSON object: 'no json'" in capsys.readouterr().err
    path.write_text('{"step_optim": 99}\n')
    assert main(["watch", str(path)]) == 2
    assert "has schema 99" in capsys.readouterr().err
