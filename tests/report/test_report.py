"""The report: one page about runs that loads nothing, says what the logs say, and draws in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim.__main__ import main
from step_optim.controllers import Action
from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.report import write_report
from step_optim.report.bins import Bins
from step_optim.report.figures import bounds, figures, largest_steps, worst_slice
from step_optim.telemetry.columns import read_columns
from step_optim.telemetry.log import JSONLWriter
from step_optim.telemetry.record import StepRecord, TrialRecord
from step_optim.telemetry.summary import summarise

SLICES = ("story", "</script><b>math")
"""A slice of a name that would end a script."""


def record(step: int, kl: float = 0.01, **changes) -> StepRecord:
    """A step of a run with a mean budget of .02 and a cap of .5; beyond the budget it is shrunk."""
    over = kl > 0.02
    accepted = min(kl, 0.02)
    made = StepRecord(
        step,
        Action.SHRINK if over else Action.COMMIT,
        Movement(kl, {name: kl * (1 + i) for i, name in enumerate(SLICES)}),
        Movement(accepted, {name: accepted * (1 + i) for i, name in enumerate(SLICES)}),
        Limits(0.02, {"story": 0.05}, 0.5, {"story": 0.6}),
        triggered=over,
        bound="mean" if over else None,
        alpha=math.sqrt(accepted / kl) if kl else 1.0,
        progress=0.9,
        trials=(TrialRecord(0.5, Movement(0.02), True),) * over,
        reference_drift=Movement(0.001 * (step + 1), dict.fromkeys(SLICES, 0.002 * (step + 1))),
        seconds={"inner": 0.1, "snapshot": 0.01, "audit": 0.2, "search": 0.1 * over, "elapsed": 1.0},
    )
    return replace(made, **changes)


def run(count: int = 12) -> list[StepRecord]:
    """Every fifth step is over budget, the seventh is rejected; at the ninth held-out prompts are measured."""
    steps = [record(i, 0.04 if i % 5 == 4 else 0.01) for i in range(count)]
    steps[6] = record(6, math.inf, action=Action.REJECT, accepted=Movement(0.0), triggered=True, alpha=0.0)
    steps[8] = record(8, held_out=Movement(0.012), held_out_drift=Movement(0.02))
    return steps


def log(path: Path, records: list[StepRecord]) -> Path:
    write = JSONLWriter(path, lambda: {"budget": "Budget(mean=0.02)", "controller": "Interpolate()"})
    for each in records:
        write(each)
    return path


class Page(HTMLParser):
    """What a page would load, its texts, and its specifications of charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.specs = json.loads(text.partition('id="specs">')[2].partition("</script>")[0])
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note addresses."""
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        """Note texts."""
        self.texts.append(data)


@pytest.fixture
def page(tmp_path) -> Page:
    """Of two runs, one of which only measured."""
    measured = [replace(each, budget=Limits(), triggered=False) for each in run()[:6]]
    logs = {"step": log(tmp_path / "a.jsonl", run()), "bare": log(tmp_path / "b.jsonl", measured)}
    return Page(write_report(logs, tmp_path / "out" / "report.html").read_text())


def test_it_loads_nothing(page) -> None:
    """No address of a script, a style, a picture or a schema."""
    assert page.loads == []
    assert "$schema" not in json.dumps(page.specs)
    assert "url" not in {key for spec in page.specs.values() for key in spec.get("data", {})}


def test_it_says_what_the_logs_say(page) -> None:
    """The table, the verdict, the worst slice with its name as text, and how it was measured."""
    texts = "".join(page.texts)
    assert "9 commit, 2 shrink, 1 reject" in texts
    assert "step: triggered on 25.0% of its steps" in texts
    assert "</script><b>math: 0.08 nats per token at step 4" in texts
    assert "Bound by: mean 2, not finite 1." in texts
    assert "Interpolate()" in texts
    assert "Not measured." in texts  # held-out prompts of the second run


def test_charts_have_the_runs_figures(page) -> None:
    """Movement as it was, one axis for both runs, rejected steps marked, and a description to be read out."""
    movement, bare = page.specs["chart0"], page.specs["chart1"]
    rows = movement["layer"][0]["data"]["values"]
    assert [row["high"] for row in rows if row["step"] in (0, 4)] == [0.01, 0.04]
    assert "high" not in rows[6]  # what is not finite has no place
    assert {row["budget"] for row in rows} == {0.02}
    marks = movement["layer"][-1]["data"]["values"]
    assert [(mark["step"], mark["action"], mark["steps"]) for mark in marks if mark["action"] == "reject"] == [
        (6, "reject", 1)
    ]
    assert [mark["step"] for mark in marks if mark["action"] == "shrink"] == [4, 9]
    ends = [spec["layer"][0]["encoding"]["y"]["scale"]["domain"] for spec in (movement, bare)]
    assert ends[0] == ends[1]
    assert all(
        spec["description"].startswith(("Movement", "Slices", "What", "Trigg", "Audits", "Drift", "Held", "Over"))
        for spec in page.specs.values()
    )


def test_the_largest_steps_are_named_with_their_batches(page, tmp_path) -> None:
    """What is not finite first; notes as they were written, lists too."""
    noted = [
        replace(each, notes={"batch": [i, i + 1], "phase": "<b>"} if i in (4, 6) else {})
        for i, each in enumerate(run())
    ]
    found = largest_steps(read_columns(log(tmp_path / "noted.jsonl", noted)), count=3)
    assert [(each.step, each.action, each.candidate) for each in found] == [
        (6, "reject", "not finite"),
        (4, "shrink", "0.04"),
        (9, "shrink", "0.04"),
    ]
    assert [each.notes for each in found] == ["batch: 6 7, phase: <b>", "batch: 4 5, phase: <b>", ""]
    assert found[1].worst == "</script><b>math 0.08"
    assert "Largest steps" in "".join(page.texts)


def test_figures_are_those_of_the_summary(tmp_path) -> None:
    """The table of the page, and `summarise`."""
    columns, summary = read_columns(log(tmp_path / "a.jsonl", run())), summarise(run())
    told = figures(columns)
    assert told["triggered"] == f"{summary['trigger_rate']:.1%} (3)"
    assert told["rejected"] == f"{summary['rejection_rate']:.1%} (1)"
    for name, key in {
        "mean alpha of triggered steps": "mean_alpha",
        "mean progress": "mean_progress",
        "audits a step": "audits_per_step",
        "movement accepted: mean": "mean_accepted_kl",
        "movement accepted: largest": "max_accepted_kl",
        "drift at the end": "reference_drift",
    }.items():
        assert told[name] == f"{summary[key]:.3g}"
    assert told["overhead"] == f"{summary['overhead_share']:.1%} of the time"
    assert bounds(columns) == "mean 2, not finite 1"


def test_a_run_of_one_step_without_slices(tmp_path) -> None:
    """Nothing is empty, nothing fails."""
    only = StepRecord(0, Action.UNCHANGED, Movement(0.0), Movement(0.0), Limits())
    columns = read_columns(log(tmp_path / "a.jsonl", [only]))
    assert worst_slice(columns) == "no slice moved"
    page = Page(write_report({"a": tmp_path / "a.jsonl"}, tmp_path / "r.html").read_text())
    assert "1 unchanged" in "".join(page.texts)


@given(values=st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=1, max_size=30), most=st.integers(1, 12))
def test_groups_of_steps(values, most) -> None:
    """Every step is in one group; ranges and means are those of its members, as a loop finds them."""
    bins, column = Bins.of(len(values), most), torch.tensor(values, dtype=torch.float64)
    groups = [values[i : i + bins.width] for i in range(0, len(values), bins.width)]
    assert len(groups) == len(bins.first) <= most
    for found, reduce in ((bins.highest, max), (bins.lowest, min), (bins.mean, lambda v: sum(v) / len(v))):
        known = [[value for value in group if value == value] for group in groups]
        wanted = [reduce(group) if group else math.nan for group in known]
        torch.testing.assert_close(found(column), torch.tensor(wanted, dtype=torch.float64), equal_nan=True)
    assert bins.final(column).tolist() == pytest.approx([group[-1] for group in groups], nan_ok=True)
    flags = [value > 0 for value in values]
    assert [i for group in bins.members(flags) for i in group] == [i for i, flag in enumerate(flags) if flag]


def test_it_is_made_on_the_cpu_whatever_the_default_device(tmp_path) -> None:
    """As where a training script has set one."""
    logs = {"a": log(tmp_path / "a.jsonl", [*run(), *(record(i) for i in range(12, 300))])}
    wanted = write_report(logs, tmp_path / "cpu.html").read_text()
    with torch.device("meta"):
        assert write_report(logs, tmp_path / "meta.html").read_text() == wanted


def test_a_long_run_stays_small(tmp_path) -> None:
    """Its page has as many points as one of 240 steps, and the worst step is still on it."""
    steps = [record(i) for i in range(3000)]
    steps[1234] = record(1234, 0.3)
    page = Page(write_report({"a": log(tmp_path / "a.jsonl", steps)}, tmp_path / "r.html").read_text())
    rows = page.specs["chart0"]["layer"][0]["data"]["values"]
    assert len(rows) <= 240
    assert max(row["high"] for row in rows) == 0.3
    assert (tmp_path / "r.html").stat().st_size < 1.6e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.jsonl"], "No such file"),
        (["empty.jsonl"], "has no records"),
        (["a=run.jsonl", "a=run.jsonl"], "two logs have the same label"),
        (["run.jsonl", "-o", "run.jsonl/page.html"], "File exists"),
        (["run.jsonl", "-o", "run.jsonl"], "exists and is no HTML page"),
        (["run.jsonl", "-o", "."], "is a folder; give a file"),
    ],
)
def test_what_the_command_refuses(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    log(Path("run.jsonl"), run())
    Path("empty.jsonl").write_text('{"step_optim": 1}\n')
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert len(read_columns("run.jsonl").action) == 12  # whatever was asked, no log is written over


def test_steps_that_are_not_finite_are_at_the_end_of_the_axis(tmp_path) -> None:
    """A candidate that was NaN was not at 0; cells of such steps are crossed, and counted."""
    steps = [record(i) for i in range(4)]
    steps[1] = record(1, candidate=Movement(math.nan), accepted=Movement(0.0), action=Action.REJECT, triggered=True)
    page = Page(write_report({"a": log(tmp_path / "a.jsonl", steps)}, tmp_path / "r.html").read_text())
    (mark,) = page.specs["chart0"]["layer"][-1]["data"]["values"]
    assert (mark["step"], mark["proposed"], mark["candidate"]) == (1, "not finite", 1e300)
    cells, crosses = (layer["data"]["values"] for layer in page.specs["chart1"]["layer"])
    assert {row["step"] for row in crosses} == {1}
    assert {row["step"] for row in cells} == {0, 2, 3}
    assert "1 steps were not finite" in "".join(page.texts)


def test_drift_by_slice_is_of_the_last_step_that_measured_it(tmp_path) -> None:
    """On an axis that has a place for all of it, with caps."""
    steps = [record(i) for i in range(5)]
    steps[4] = record(4, reference_drift=None)
    page = Page(write_report({"a": log(tmp_path / "a.jsonl", steps)}, tmp_path / "r.html").read_text())
    spec = next(spec for spec in page.specs.values() if spec["description"].startswith("Drift by slice"))
    rows = {(row["slice"], row["of"]): row["value"] for row in spec["data"]["values"]}
    assert rows["story", "drift"] == 0.008
    assert rows["story", "cap"] == 0.6
    assert spec["encoding"]["shape"]["scale"]["range"][-1].endswith("Z")  # closed: an open line has nothing to fill
    low, high = spec["encoding"]["x"]["scale"]["domain"]
    assert all(low < value < high for value in rows.values())


def test_a_budget_that_changes_is_drawn_beside_the_step_that_was_nearest_to_it(tmp_path) -> None:
    """So that a group of steps shows no violation that none of them had."""
    steps = [
        record(i, 0.01, budget=Limits(mean=0.0101))
        if i % 2
        else record(i, 0.04, action=Action.COMMIT, triggered=False, accepted=Movement(0.04), budget=Limits(mean=0.1))
        for i in range(1000)
    ]
    page = Page(write_report({"a": log(tmp_path / "a.jsonl", steps)}, tmp_path / "r.html").read_text())
    rows = page.specs["chart0"]["data"]["values"]  # of all layers
    assert all(row["accepted"] <= row["budget"] for row in rows)


def test_long_notes_are_shortened(tmp_path) -> None:
    """A batch of thousands has a place in the table."""
    noted = [record(0, notes={"batch": list(range(3000)), "text": "x" * 500})]
    (found,) = largest_steps(read_columns(log(tmp_path / "a.jsonl", noted)))
    assert found.notes.startswith("batch: 0 1 2 3 4 5 6 7 8 9 10 11 ... (3,000 in all), text: xxx")
    assert len(found.notes) < 200


def test_without_the_libraries_it_says_what_to_install(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    path = log(tmp_path / "run.jsonl", run())
    assert main(["report", str(path), "-o", str(tmp_path / "r.html")]) == 2
    assert "pip install 'step-optim[report]'" in capsys.readouterr().err


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_draws_every_chart(tmp_path) -> None:
    """An SVG for each, with its description for screen readers; and nothing went wrong, whatever slices are called."""
    odd = dict.fromkeys(["constructor", "__proto__", "a.b[0]", "\u2028x", "x" * 80, *map(str, range(300))], 0.01)
    named = [replace(each, candidate=Movement(0.01, odd), reference_drift=Movement(0.02, odd)) for each in run(9)]
    logs = {"step": log(tmp_path / "a.jsonl", run()), "again": log(tmp_path / "b.jsonl", named)}
    page = write_report(logs, tmp_path / "report.html")
    options = [*QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    shown = subprocess.run(
        [BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    specs = Page(page.read_text()).specs
    assert "This chart could not be drawn: " not in shown.partition("<script")[0]
    assert len(re.findall(r'<svg[^>]*class="marks"', shown)) == len(specs)
    assert len(re.findall(r'aria-label="Movement of each step, step', shown)) == 1
