"""Alerts: what is told of a run, and how often."""

from __future__ import annotations

import math
import pickle
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from step_optim import Action, Movement, STEPOptimizer, StepRecord, read_log
from step_optim.limits import Limits
from step_optim.path_length import PathLength
from step_optim.telemetry import Tracker, open_log
from step_optim.telemetry.alerts import KINDS, QUIET, Alert, Alerts

LIMITS = Limits(mean=0.1, slices={"math": 0.2}, drift=0.5)


def record(step: int, constraint: str | None, action: Action = Action.SHRINK, **fields: Any) -> StepRecord:
    """A step that one constraint bound at twice its limit, or none."""
    kl = 0.01 if constraint is None else 0.2
    return StepRecord(
        step,
        Action.COMMIT if constraint is None else action,
        Movement(math.nan if constraint == "not finite" else kl, {"math": 2 * kl}),
        Movement(0.01, {"math": 0.01}),
        LIMITS,
        triggered=constraint is not None,
        bound=None if constraint == "not finite" else constraint,
        candidate_drift=Movement(1.0, {"math": 1.0}),
        alpha=0.5,
        **fields,
    )


def told(records: list[StepRecord], kinds: Any = KINDS) -> list[Alert]:
    """The alerts of a run."""
    found: list[Alert] = []
    alerts = Alerts(found.append, kinds)
    for each in records:
        alerts(each)
    return found


CONSTRAINTS = st.sampled_from([None, "mean", "slice:math", "drift", "not finite"])


@given(st.lists(st.tuples(st.integers(1, 2 * QUIET), CONSTRAINTS), max_size=40))
def test_a_constraint_is_told_when_it_has_been_quiet(gaps) -> None:
    """Brute force: of all steps that a constraint bound, those with none of it in the `QUIET` steps before."""
    steps, step = [], 0
    for gap, constraint in gaps:
        step += gap
        steps.append((step, constraint))
    expected = [
        (now, bound)
        for now, bound in steps
        if bound is not None and not any(other == bound and now - QUIET <= then < now for then, other in steps)
    ]
    found = told([record(now, bound) for now, bound in steps])
    assert [int(alert.text.split()[1].rstrip(":")) for alert in found] == [now for now, _ in expected]
    assert [alert.kind for alert in found] == ["cap" if bound == "drift" else "trigger" for _, bound in expected]
    assert [alert.step for alert in found] == [now for now, _ in expected]


@given(st.lists(st.sampled_from([Action.REJECT, Action.REJECT, Action.REJECT, Action.SHRINK]), max_size=120))
def test_streaks_are_told_at_five_and_fifty(actions) -> None:
    """Whatever else bounds: a streak ends with a step that is not rejected."""
    found = told([record(step, "mean", action) for step, action in enumerate(actions)], ("stall",))
    streak, expected = 0, []
    for action in actions:
        streak = streak + 1 if action is Action.REJECT else 0
        expected += [streak] if streak in (5, 50) else []
    assert [int(alert.text.split()[2]) for alert in found] == expected


def test_texts_name_the_step_the_constraint_and_the_decision() -> None:
    """Against the budget, or against the cap."""
    records = [
        record(3, "slice:math"),
        record(4, "drift"),
        record(5, "not finite", Action.REJECT),
        record(6, None, error="ValueError: no"),
    ]
    assert [(alert.level, alert.text) for alert in told(records)] == [
        ("info", "Step 3: slice:math at 2 times its budget; shrink, alpha 0.5."),
        ("warn", "Step 4: drift at 2 times its cap; shrink, alpha 0.5."),
        ("info", "Step 5: the candidate is not finite; reject, alpha 0.5."),
        ("error", "Step 6: ValueError: no"),
    ]


def test_what_is_held_against_a_budget_is_its_bound() -> None:
    """With a confidence, the figure is the upper bound that was judged."""
    bounded = record(0, "mean", candidate_bounds={"mean": 0.4})
    assert told([bounded])[0].text.startswith("Step 0: mean at 4 times its budget")


def test_the_end_of_a_path_is_told_as_what_is_left_of_it() -> None:
    """And not as a candidate that is far below the cap; with a confidence it is the bound that was compared."""
    limits = Limits(mean=0.3, path=2.0, path_slices={"math": 1.0}).after(PathLength(1.75, {"math": 0.9375}))
    moved = Movement(0.5, {"math": 0.125})
    steps = [
        StepRecord(i, Action.SHRINK, moved, moved.still(), limits, True, name, alpha=0.5, candidate_bounds=bounds)
        for i, (name, bounds) in enumerate([("path", {}), ("path:math", {})])
    ]
    steps.append(replace(steps[0], step=200, candidate_bounds={"mean": 0.75}))
    assert [(alert.kind, alert.text.partition("; ")[0]) for alert in told(steps)] == [
        ("cap", "Step 0: path has 0.25 of its cap of 2 left, and the candidate takes 0.5"),
        ("cap", "Step 1: path:math has 0.0625 of its cap of 1 left, and the candidate takes 0.125"),
        ("cap", "Step 200: path has 0.25 of its cap of 2 left, and the candidate takes 0.75"),
    ]


def test_a_budget_of_nothing_is_no_division() -> None:
    """Twice nothing says nothing."""
    still = StepRecord(0, Action.REJECT, Movement(0.1), Movement(0.0), Limits(mean=0.0), True, "mean", alpha=0.0)
    assert told([still])[0].text == "Step 0: mean is over its budget of 0; reject, alpha 0."


@pytest.mark.parametrize(
    ("kinds", "error"),
    [("trigger", TypeError), (None, TypeError), (("trigger", "alarm"), ValueError), (["stalls"], ValueError)],
)
def test_unknown_kinds_are_refused(kinds, error) -> None:
    """With those that there are."""
    with pytest.raises(error, match=r"alerts=.*choose from \('trigger', 'stall', 'cap', 'error'\)"):
        Tracker(Board(), alerts=kinds)


def test_what_a_tracker_cannot_do_is_refused() -> None:
    """Chosen alerts for one that has none, empty names, and what is no tracker."""
    with pytest.raises(ValueError, match="SimpleNamespace has no alerts to send"):
        Tracker(types.SimpleNamespace(log=lambda values, step: None), alerts=("stall",))
    with pytest.raises(ValueError, match="name='' is empty"):
        Tracker(Board(), name="")
    with pytest.raises(TypeError, match=r"Tracker\('run.jsonl'\) is no tracker"):
        Tracker("run.jsonl")


def test_a_gate_whose_patience_ends_is_told_of_once_in_a_while() -> None:
    """Its record is that of the step which it let through."""
    records = [record(step, "mean", stalled=step % 4 == 3) for step in range(3 * QUIET)]
    found = told(records, ("stall",))
    assert [alert.text for alert in found] == ["Step 3: the gate's patience was used up; shrink, alpha 0.5."]
    again = told([*records, record(5 * QUIET, "mean", stalled=True)], ("stall",))
    assert [alert.step for alert in again] == [3, 5 * QUIET]


def test_two_kinds_of_errors_are_two_alerts_and_a_candidate_that_is_not_finite_is_one() -> None:
    """A NaN is an error in the record, and what bound the step, too."""
    errors = ["OSError: disk", "ValueError: no", "OSError: again"]
    found = told([record(step, None, error=error) for step, error in enumerate(errors)])
    assert [alert.text for alert in found] == ["Step 0: OSError: disk", "Step 1: ValueError: no"]
    (alert,) = told([record(0, "not finite", Action.REJECT, error="the candidate's KL is not finite: mean nan")])
    assert alert.kind == "trigger"


def test_two_optimizers_have_names_of_their_own() -> None:
    """Their curves do not mix."""
    board = Board()
    for name in ("actor", "critic"):
        open_log(Tracker(board, name=name), dict)(record(0, "mean"))
    found = {name for name, _, _ in board.scalars if name.endswith("candidate/mean")}
    assert found == {"step_optim/actor/candidate/mean", "step_optim/critic/candidate/mean"}


class Board:
    """A writer of scalars and texts; it may be full."""

    def __init__(self, full: bool = False) -> None:
        self.scalars, self.texts, self._full = [], [], full

    def add_scalar(self, name: str, value: float, global_step: int) -> None:
        if self._full:
            raise OSError("no space left")
        self.scalars.append((name, value, global_step))

    def add_text(self, name: str, text: str, global_step: int) -> None:
        self.texts.append(text)

    def flush(self) -> None:
        """Nothing waits."""


def test_several_logs_get_every_record_also_if_one_fails(tmp_path) -> None:
    """A full disk is told of, and the others have the record."""
    path, second, seen = tmp_path / "run.jsonl", Board(), []
    sink = open_log([Board(full=True), str(path), second, lambda plain, step: seen.append(step)], dict)
    for step in range(2):
        with pytest.raises(OSError, match="no space left"):
            sink(record(step, "mean"))
    assert [each.step for each in read_log(path)] == seen == [0, 1]
    assert {step for _, _, step in second.scalars} == {0, 1}
    assert len(second.texts) == 1


def test_a_list_is_checked_at_construction(tmp_path) -> None:
    """Each of its parts, as if it stood alone; nothing twice, and no list in it."""
    board = Board()
    with pytest.raises(TypeError, match="log=3 is neither"):
        open_log([tmp_path / "run.jsonl", 3], dict)
    for twice in ([board, board], [tmp_path / "a.jsonl", str(tmp_path / "a.jsonl")]):
        with pytest.raises(ValueError, match="twice; every record would be written twice"):
            open_log(twice, dict)
    with pytest.raises(ValueError, match="has a list in it"):
        open_log([[board]], dict)


def test_the_first_failure_of_several_logs_is_raised_and_an_interrupt_is_none(caplog) -> None:
    """The others are logged; Ctrl-C stops at once."""

    def fails(error: BaseException) -> Any:
        def log(plain: dict[str, Any], step: int) -> None:
            raise error

        return log

    with pytest.raises(OSError, match="first"):
        open_log([fails(OSError("first")), fails(ValueError("second"))], dict)(record(0, None))
    assert "second" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        open_log([fails(KeyboardInterrupt()), fails(ValueError("second"))], dict)(record(0, None))


def test_two_optimizers_that_write_one_file_are_told(tmp_path) -> None:
    """The reader takes the second one's steps for those of a resumed run."""
    sinks = [open_log(tmp_path / "run.jsonl", dict) for _ in range(2)]
    sinks[0](record(0, None))
    sinks[1](record(0, None))
    with pytest.warns(UserWarning, match=r"run\.jsonl is written by another optimizer, too"):
        sinks[0](record(1, None))
    sinks[0](record(2, None))  # once


def test_a_log_stays_where_it_is(tmp_path, monkeypatch) -> None:
    """Though the process goes elsewhere: a relative path is one from where the optimizer was made."""
    monkeypatch.chdir(tmp_path)
    sink = open_log("run.jsonl", dict)
    sink(record(0, None))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sink(record(1, None))
    assert [each.step for each in read_log(tmp_path / "run.jsonl")] == [0, 1]


def test_trackers_are_written_by_the_first_process_alone() -> None:
    """As files are; functions are called in each."""
    board, seen = Board(), []
    for first in (True, False):
        open_log([board, lambda plain, step: seen.append(step)], dict, lambda first=first: first)(record(7, None))
    assert len({name for name, _, _ in board.scalars}) == len(board.scalars)
    assert seen == [7, 7]


def test_a_copy_goes_on_with_the_paths_of_a_list(tmp_path) -> None:
    """Trackers are not pickled, as when they stand alone."""
    weight = nn.Parameter(torch.zeros(1))
    log = [str(tmp_path / "run.jsonl"), Board()]
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=lambda: weight.square().sum(), budget=1.0, log=log)
    twin = pickle.loads(pickle.dumps(optimizer))
    twin.bind(lambda: 0.0)
    for group in twin.param_groups:
        group["params"][0].grad = torch.ones(1)
    twin.step()
    assert len(read_log(log[0])) == 1
    assert not log[1].scalars
