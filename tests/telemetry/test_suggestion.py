"""Suggested budgets, from records and from the command line."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Action, Budget, Movement, StepRecord
from step_optim.__main__ import main
from step_optim.limits import Limits
from step_optim.telemetry import JSONLWriter, suggest_budget

kls = st.floats(1e-9, 10.0).map(lambda kl: float(f"{kl:.9g}"))
"""Equal ones, and such as differ by more than the rounding of a logarithm."""


def moved(step: int, mean: float, slices: dict[str, float] | None = None, **values) -> StepRecord:
    movement = Movement(mean, slices or {})
    return StepRecord(step, Action.COMMIT, movement, movement, values.pop("budget", Limits()), **values)


def run(*means: float) -> list[StepRecord]:
    return [moved(step, mean, {"math": 2 * mean}) for step, mean in enumerate(means)]


RUN = run(*(0.01 * math.exp(math.sin(step**2)) for step in range(60)))


@given(means=st.lists(kls, min_size=2, max_size=60), rate=st.floats(0.01, 0.9))
def test_about_so_many_steps_are_over_the_suggested_budgets(means, rate) -> None:
    """No more than were asked, where a log has so many; the shares are counted, and the line is the budget."""
    found = suggest_budget(run(*means), rate)
    over = [mean > found.budgets["mean"] or 2 * mean > found.budgets["slice:math"] for mean in means]
    assert found.triggered == sum(over) / len(means) <= rate * (len(means) + 1) / len(means)
    assert found.exceeded["mean"] == sum(mean > found.budgets["mean"] for mean in means) / len(means)
    assert eval(found.line, {"Budget": Budget}) == found.budget
    assert found.budget == Budget(mean=found.budgets["mean"], slices={"math": found.budgets["slice:math"]})
    assert found.steps == len(means)


def test_the_report() -> None:
    found = suggest_budget(RUN, 0.1, skip=10)
    low, high = found.intervals["mean"]
    assert str(found).splitlines() == [
        "from 50 steps, without the first 10",
        f"mean                       0.0264   [{low:.3g}, {high:.3g}]  8.0% of the steps were over it",
        f"slice:math                 0.0527   [{2 * low:.3g}, {2 * high:.3g}]  10.0% of the steps were over it",
        "10.0% of the steps were over one of them",
        "Budget(mean=0.0264, slices={'math': 0.0527})",
    ]
    assert low < 0.0264 < high
    assert str(suggest_budget(RUN)).startswith("from 60 steps\n")


def test_what_a_run_without_slices_gets() -> None:
    assert suggest_budget([moved(0, 0.01), moved(1, 0.02), moved(2, 0.01)]).line.startswith("Budget(mean=0.0")
    assert suggest_budget([moved(0, 0.01), moved(1, 0.02)]).budget.slices is None


def test_slices_that_some_steps_lack_are_left_out() -> None:
    found = suggest_budget([moved(0, 0.01, {"a": 0.1}), moved(1, 0.02), moved(2, 0.01, {"a": 0.1, "b": 0.2})])
    assert list(found.budgets) == ["mean"]


def test_steps_that_say_nothing_are_left_out() -> None:
    still, nan = Movement(0.0), Movement(math.nan)
    silent = [
        StepRecord(0, Action.UNCHANGED, still, still, Limits()),
        StepRecord(1, Action.COMMIT, still, still, Limits()),
        StepRecord(2, Action.REJECT, nan, still, Limits(), error="not finite"),
        moved(3, 0.5, error="RuntimeError: as planned"),
    ]
    assert suggest_budget([*silent, *RUN]) == suggest_budget(RUN)


def test_skipped_records_are_the_first_ones_also_those_that_say_nothing() -> None:
    silent = [replace(record, error="no") for record in RUN[:5]]
    assert suggest_budget([*silent, *RUN[5:]], skip=5) == replace(suggest_budget(RUN[5:]), skipped=5)
    assert suggest_budget([*silent, *RUN[5:]], skip=8) == replace(suggest_budget(RUN[8:]), skipped=8)


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([], {}, "0 of 0 records, skip=0 left out, have a candidate that moved the policy"),
        (RUN[:1], {}, "1 of 1 records, .* a budget takes at least two"),
        (RUN, {"skip": 59}, "1 of 60 records, skip=59"),
        (RUN, {"skip": -1}, "skip=-1"),
        (RUN, {"trigger_rate": 0.0}, "trigger_rate=0.0"),
    ],
)
def test_what_says_too_little_is_refused(records, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        suggest_budget(records, **options)


def test_figures_are_no_upper_bounds_and_that_is_said() -> None:
    records = [moved(step, 0.01 * (1 + step % 3), budget=Limits(1.0, confidence=0.9)) for step in range(6)]
    found = suggest_budget(records)
    assert found.confidence == 0.9
    assert "held against upper bounds (confidence=0.9); these are not" in str(found)


# -- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path) -> dict[str, str]:
    def write(name: str, records: list[StepRecord]) -> str:
        writer = JSONLWriter(tmp_path / f"{name}.jsonl", dict)
        for record in records:
            writer(record)
        return str(tmp_path / f"{name}.jsonl")

    return {name: write(name, records) for name, records in {"run": RUN, "one": RUN[:1]}.items()}


def test_the_command_suggests_for_every_log(logs, capsys) -> None:
    assert main(["suggest", logs["run"], f"again={logs['run']}", "--trigger-rate", "0.2", "--skip", "5"]) == 0
    out = capsys.readouterr().out.splitlines()
    expected = ["  " + line for line in str(suggest_budget(RUN, 0.2, skip=5)).splitlines()]
    assert out == [logs["run"], *expected, "again", *expected]


def test_the_command_has_defaults(logs, capsys) -> None:
    assert main(["suggest", logs["run"]]) == 0
    assert suggest_budget(RUN, 0.05).line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("log", "options", "message"),
    [
        ("one", [], "one.jsonl: 1 of 1 records, skip=0"),
        ("run", ["--trigger-rate", "2"], "run.jsonl: trigger_rate=2.0 must be above 0 and below 1"),
        ("run", ["--skip", "60"], "run.jsonl: 0 of 60 records, skip=60"),
    ],
)
def test_the_command_says_what_is_missing(logs, capsys, log, options, message) -> None:
    assert main(["suggest", logs[log], *options]) == 2
    assert message in capsys.readouterr().err
