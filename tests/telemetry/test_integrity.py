"""Integrity: two labels with one trace are not two conditions; and the command line around it."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Action, Budget, Controller, Gate, Interpolate, Movement, STEPOptimizer, StepRecord
from step_optim.__main__ import main
from step_optim.budget import Limits
from step_optim.telemetry.integrity import check
from step_optim.telemetry.log import read_log
from step_optim.telemetry.record import jsonable
from step_optim.telemetry.summary import summarise


def trace(
    controller: Controller | None = None, budget: float = 0.01, lr: float = 1.0, log: Path | None = None
) -> list[StepRecord]:
    """Five steps of a toy run."""
    weight, seen = torch.nn.Parameter(torch.zeros(2)), []
    before = weight.detach().clone()
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=lr),
        kl=lambda: ((weight - before) ** 2).sum(),
        budget=Budget(mean=budget),
        controller=controller,
        log=log,
    )
    for i in range(5):
        before.copy_(weight.detach())
        weight.grad = torch.tensor([-0.05 * i, 0.02])
        optimizer.note(reward=float(weight.detach().sum()))
        optimizer.step()
        seen.append(optimizer.last)
    return seen


def test_different_conditions_pass() -> None:
    """Two controllers that acted, differently, are fine."""
    report = check({"gate": trace(Gate()), "interpolate": trace(Interpolate())})
    assert report.ok
    assert report.never_acted == ()
    assert report.identical == ()
    assert 0 < report.trigger_rates["gate"] < 1
    assert str(report).endswith("ok")


def test_identical_traces_are_flagged() -> None:
    """The same run under two labels is one condition, also if its clock and its wording of the budget differ."""
    once, again = trace(Gate()), trace(Gate())
    again = [replace(record, seconds={"inner": 9.9}) for record in again]
    report = check({"a": once, "b": again, "c": trace(Interpolate())})
    assert report.identical == (("a", "b"),)
    assert not report.ok
    assert "IDENTICAL: a and b" in str(report)


def test_conditions_that_never_act_are_flagged_and_identical() -> None:
    """The paper's failure: budgets that never bind make every controller the baseline, and both checks say so."""
    runs = {"gate": trace(Gate(), budget=10.0), "interpolate": trace(Interpolate(), budget=20.0)}
    report = check(runs)
    assert report.never_acted == ("gate", "interpolate")
    assert report.identical == (("gate", "interpolate"),)
    assert "NEVER ACTED: gate" in str(report)


def test_a_run_that_only_measures_is_not_expected_to_act() -> None:
    """An infinite budget is a baseline, not a controller that failed."""
    report = check({"baseline": trace(budget=math.inf), "gate": trace(Gate())})
    assert report.ok
    assert report.trigger_rates["baseline"] == 0


LOUD = StepRecord(0, Action.SHRINK, Movement(0.5), Movement(0.1), Limits(mean=0.1), triggered=True, alpha=0.4, reward=1)

CHANGES = {
    "action": Action.REJECT,
    "alpha": 0.3,
    "candidate": Movement(0.6),
    "accepted": Movement(0.09),
    "update_norm": 2.0,
    "reference_drift": Movement(1.0),
    "reward": 2.0,
    "step": 1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_any_difference_counts(name) -> None:
    """One different figure or decision in one step makes two traces two."""
    other = replace(LOUD, **{name: CHANGES[name]})
    assert check({"a": [LOUD], "b": [other]}).identical == ()
    assert check({"a": [LOUD], "b": [LOUD]}).identical == (("a", "b"),)
    assert check({"a": [LOUD], "b": [LOUD, replace(LOUD, step=1)]}).identical == ()


def test_nan_equals_itself_here() -> None:
    """Two runs that both broke in the same way have the same trace."""
    broken = replace(LOUD, candidate=Movement(math.nan))
    assert check({"a": [broken], "b": [replace(broken)]}).identical == (("a", "b"),)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_trigger_rates(triggered) -> None:
    """The rate is triggers per step, and only a run without any has never acted."""
    run = [replace(LOUD, step=i, triggered=flag) for i, flag in enumerate(triggered)]
    report = check({"run": run})
    assert report.trigger_rates["run"] == pytest.approx(sum(triggered) / len(triggered))
    assert report.never_acted == (() if any(triggered) else ("run",))


def test_a_run_without_records_is_an_error() -> None:
    """Nothing logged is not a passed check."""
    with pytest.raises(ValueError, match=r"runs without records: \['b'\]"):
        check({"a": [LOUD], "b": []})


@pytest.fixture
def logs(tmp_path) -> dict[str, str]:
    """Logs of a gate, of the same gate again, of interpolation, of one that never acted, and of no log at all."""
    trace(Gate(), log=tmp_path / "gate.jsonl")
    trace(Gate(), log=tmp_path / "again.jsonl")
    trace(Interpolate(), log=tmp_path / "interpolate.jsonl")
    trace(Gate(), budget=10.0, log=tmp_path / "idle.jsonl")
    trace(Gate(), budget=math.inf, log=tmp_path / "baseline.jsonl")
    (tmp_path / "foreign.jsonl").write_text("not a log\nat all\n")
    return {path.stem: str(path) for path in tmp_path.iterdir()} | {"missing": str(tmp_path / "missing.jsonl")}


@pytest.mark.parametrize(
    ("which", "code", "says"),
    [
        (["gate", "interpolate"], 0, "ok"),
        (["gate", "baseline"], 0, "ok"),
        (["gate", "again"], 1, "IDENTICAL"),
        (["gate", "idle"], 1, "NEVER ACTED"),
        (["gate", "foreign"], 2, "line 1 is no JSON object"),
        (["gate", "missing"], 2, "missing.jsonl"),
        (["gate", "gate"], 2, "same label"),
    ],
)
def test_exit_codes(logs, capsys, which, code, says) -> None:
    """0 for conditions that differ, 1 for a failed check, 2 for logs that cannot be read."""
    assert main(["integrity", *(logs[name] for name in which)]) == code
    captured = capsys.readouterr()
    assert says in (captured.err if code == 2 else captured.out)


def test_labels(logs, capsys) -> None:
    """LABEL=LOG names a run in the report."""
    assert main(["integrity", f"hard gate={logs['gate']}", f"twin={logs['again']}"]) == 1
    assert "IDENTICAL: hard gate and twin" in capsys.readouterr().out


def test_summary_as_json(logs, capsys) -> None:
    """The figures of `summarise` by label, for programs; what is not finite is a text."""
    assert main(["summary", "--json", logs["gate"], f"x={logs['interpolate']}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        label: jsonable(summarise(read_log(logs[name])))
        for label, name in ((str(logs["gate"]), "gate"), ("x", "interpolate"))
    }


def test_summary_command(logs, capsys) -> None:
    """`summary` prints the figures of every log, and fails with 2 where there is none."""
    assert main(["summary", logs["gate"], f"x={logs['interpolate']}"]) == 0
    out = capsys.readouterr().out
    assert "trigger_rate" in out
    assert out.splitlines()[0] == logs["gate"]
    assert "\nx\n" in out
    assert main(["summary", logs["missing"]]) == 2
    assert "missing.jsonl" in capsys.readouterr().err


def test_usage_errors_exit_with_2(capsys) -> None:
    """No command, and a command without logs, are usage errors."""
    for arguments in ([], ["integrity"], ["dance", "a.jsonl"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(("which", "code"), [("again", 1), ("foreign", 2)])
def test_the_module_as_a_program(logs, which, code) -> None:
    """``python -m step_optim integrity`` hands its exit code to the shell."""
    done = subprocess.run(
        [sys.executable, "-m", "step_optim", "integrity", logs["gate"], logs[which]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
