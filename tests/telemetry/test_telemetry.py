"""Telemetry: records that survive JSON, logs that survive a kill, summaries that survive a checkpoint."""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_optim import Action, Budget, Gate, Movement, STEPOptimizer, StepRecord, read_log, summarise
from step_optim.budget import Limits
from step_optim.telemetry import log as telemetry
from step_optim.telemetry.log import JSONLWriter, read_trace
from step_optim.telemetry.record import TrialRecord
from step_optim.telemetry.summary import Summary

number = st.floats(allow_nan=True, allow_infinity=True)
positive = st.floats(0, allow_infinity=True) | st.just(math.nan)
names = st.text(min_size=1, max_size=8).filter(lambda name: name != "mean")
maybe = st.none() | number
movements = st.builds(Movement, positive, st.dictionaries(names, positive, max_size=3))
records = st.builds(
    StepRecord,
    step=st.integers(0, 10**9),
    action=st.sampled_from(Action),
    candidate=movements,
    accepted=movements,
    budget=st.builds(Limits, positive, st.dictionaries(names, positive, max_size=3), positive),
    triggered=st.booleans(),
    bound=st.none() | names,
    alpha=maybe,
    alpha_realised=maybe,
    trials=st.lists(st.builds(TrialRecord, maybe, movements, st.booleans()), max_size=3).map(tuple),
    stalled=st.booleans(),
    projection=st.dictionaries(names, number, max_size=3),
    reference_drift=st.none() | movements,
    update_norm=number,
    lr=st.lists(number, max_size=3).map(tuple),
    reward=maybe,
    success=st.booleans(),
    seconds=st.dictionaries(st.sampled_from(["inner", "snapshot", "audit", "search"]), st.floats(0, 1e3)),
    error=st.none() | st.text(max_size=20),
    notes=st.dictionaries(names, st.integers() | st.text(max_size=5) | st.floats(allow_nan=False), max_size=2),
)


def refuse(constant: str) -> None:
    """A constant that strict JSON does not have."""
    raise AssertionError(f"{constant} is no JSON")


def strict(text: str) -> dict:
    """Parse as JavaScript would: no NaN, no Infinity."""
    return json.loads(text, parse_constant=refuse)


def same(a: StepRecord, b: StepRecord) -> bool:
    """Equal, with NaN equal to itself and infinities told apart from it."""
    return repr(a) == repr(b)


def finite_notes(record: StepRecord) -> bool:
    """Whether the notes hold no infinity, which come back as texts: a note may be anything."""
    return all(not isinstance(value, float) or math.isfinite(value) for value in record.notes.values())


@settings(max_examples=100)
@given(records.filter(finite_notes))
def test_a_record_survives_strict_json(record) -> None:
    """to_dict, JSON without NaN constants, and from_dict give the record back, NaN and infinities included."""
    plain = strict(json.dumps(record.to_dict(), allow_nan=False))
    assert same(StepRecord.from_dict(plain), record)


@given(records)
def test_fields_of_newer_versions_are_ignored(record) -> None:
    """A log of a later version that added a field can still be read."""
    plain = record.to_dict() | {"a field of the future": [1]}
    assert StepRecord.from_dict(plain).to_dict() == record.to_dict()


@given(records)
def test_flat_records_are_scalars(record) -> None:
    """What a tracker gets is numbers, texts and flags under slash-separated names, infinities as floats."""
    flat = record.flat()
    assert all(isinstance(value, (int, float, str, bool)) for value in flat.values())
    assert all(name.startswith("step_optim/") for name in flat)
    assert repr(flat["step_optim/candidate/mean"]) == repr(record.candidate.mean)
    assert flat["step_optim/trials"] == len(record.trials)
    assert ("step_optim/alpha" in flat) == (record.alpha is not None)


def run(steps: int, log=None, budget: float = 0.05, **options) -> STEPOptimizer:
    """A run of plain gradient steps on a quadratic, some of which are over the budget."""
    weight = torch.nn.Parameter(torch.zeros(2))
    before = weight.detach().clone()
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        kl=lambda: {"a": ((weight - before) ** 2).sum(), "b": 0.1},
        budget=Budget(mean=budget),
        log=log,
        **options,
    )
    advance(optimizer, weight, before, steps)
    return optimizer


def advance(optimizer: STEPOptimizer, weight: torch.Tensor, before: torch.Tensor, steps: int) -> None:
    """Take steps of growing size."""
    for i in range(steps):
        before.copy_(weight.detach())
        weight.grad = torch.tensor([-0.05 * i, 0.02])
        optimizer.note(reward=float(i), phase=f"p{i}")
        optimizer.step()


def test_log_file_round_trip(tmp_path) -> None:
    """Every step is one strict JSON line behind a header with the schema version; reading it back gives the records."""
    path = tmp_path / "deep" / "run.jsonl"
    seen = []
    optimizer = run(6, log=path)
    run(6, log=lambda record, step: seen.append((record, step)))
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    assert strict(header)["step_optim"] == 1
    assert {"optimizer", "budget", "controller", "kl"} <= set(strict(header))
    assert len(lines) == 6
    for line, (record, step) in zip(lines, seen, strict=True):
        drop = {"seconds"}
        assert {k: v for k, v in strict(line).items() if k not in drop} == {
            k: v for k, v in record.items() if k not in drop
        }
        assert strict(line)["step"] == step
    trace = read_log(path)
    assert [record.step for record in trace] == list(range(6))
    assert same(trace[-1], optimizer.last)
    assert trace[2].reward == 2.0
    assert trace[2].notes == {"phase": "p2"}


def test_summary_equals_the_summary_of_the_log(tmp_path) -> None:
    """`summary()` and `summarise(read_log())` are the same figures, to the last bit."""
    path = tmp_path / "run.jsonl"
    optimizer = run(8, log=path)
    assert summarise(read_log(path)) == optimizer.summary()


@given(st.lists(records, max_size=6), st.integers(0, 6))
def test_summary_survives_a_checkpoint(trace, cut) -> None:
    """Totals that are saved and loaded in the middle of a run end where the uninterrupted ones do; times begin anew."""
    first, whole = Summary(), Summary()
    for record in trace[:cut]:
        first = first.plus(record)
    second = Summary(json.loads(json.dumps(first.state_dict())))
    for record in trace[cut:]:
        second = second.plus(record)
    for record in trace:
        whole = whole.plus(record)
    assert not [name for name in first.state_dict() if "seconds" in name]
    assert repr(timeless(second.figures())) == repr(timeless(whole.figures()))
    assert repr(second.figures()["inner_seconds"]) == repr(sum(r.seconds.get("inner", 0.0) for r in trace[cut:]) + 0.0)


def timeless(figures: dict[str, object]) -> dict[str, object]:
    """Figures that equal runs have in common."""
    return {name: value for name, value in figures.items() if not name.endswith(("_seconds", "_share"))}


def test_summary_counts_and_means() -> None:
    """The figures are what their names say, on a trace that can be added up by hand."""
    limits = Limits(mean=0.1)

    def record(step: int, action: Action, candidate: float, accepted: float, alpha: float | None) -> StepRecord:
        return StepRecord(
            step=step,
            action=action,
            candidate=Movement(candidate, {"a": 2 * candidate}),
            accepted=Movement(accepted, {"a": 2 * accepted}),
            budget=limits,
            triggered=action not in (Action.COMMIT, Action.UNCHANGED),
            alpha=alpha,
            trials=(TrialRecord(0.5, Movement(0.1), True),) if action is Action.SHRINK else (),
            reference_drift=Movement(0.25 * step),
            seconds={"inner": 1.0, "audit": 2.0, "search": 1.0, "snapshot": 0.5} | ({"elapsed": 7.0} if step else {}),
        )

    figures = summarise(
        [
            record(0, Action.COMMIT, 0.05, 0.05, 1.0),
            record(1, Action.SHRINK, 0.4, 0.1, 0.5),
            record(2, Action.REJECT, math.nan, 0.0, 0.0),
            record(3, Action.UNCHANGED, 0.0, 0.0, None),
        ]
    )
    assert figures["steps"] == 4
    assert [figures[f"{name}s"] for name in ("commit", "shrink", "reject", "project")] == [1, 1, 1, 0]
    assert figures["unchanged"] == 1
    assert figures["trigger_rate"] == 0.5
    assert figures["rejection_rate"] == 0.25
    assert figures["mean_alpha"] == 0.25
    assert figures["audits_per_step"] == 1.0  # 1, 2, 1, 0
    assert figures["mean_candidate_kl"] == pytest.approx(0.15)
    assert figures["mean_accepted_kl"] == pytest.approx(0.0375)
    assert figures["max_accepted_kl"] == 0.1
    assert figures["max_accepted_slice_kl"] == 0.2
    assert figures["reference_drift"] == 0.75
    assert figures["inner_seconds"] == 4.0
    assert [figures[f"{name}_seconds"] for name in ("snapshot", "audit", "search")] == [2.0, 8.0, 4.0]
    assert figures["overhead_seconds"] == 14.0
    assert figures["elapsed_seconds"] == 21.0
    assert figures["overhead_share"] == 0.5  # of three steps: the time before the first is not known


def test_the_time_between_two_steps_is_recorded(monkeypatch) -> None:
    """From the end of one step to that of the next, whatever became of them; a copy, as a new process, begins anew."""
    weight = torch.nn.Parameter(torch.zeros(2))
    seen: list[dict[str, float]] = []
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        kl=lambda: 0.0,
        budget=1.0,
        log=lambda record, _: seen.append(record["seconds"]),
    )
    weight.grad = torch.ones(2)
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    optimizer.step()
    assert "elapsed" not in optimizer.last.seconds
    begun = next(ticks)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(kl=lambda: 1 / 0)
    with optimizer.window():
        for _ in range(40):  # the training loop looks at the clock, too
            next(ticks)
        optimizer.step()
    elapsed = [record["elapsed"] for record in seen[1:]]
    assert elapsed[1] > 40 > elapsed[0]
    assert sum(elapsed) == next(ticks) - begun
    figures = optimizer.summary()
    own = sum(record[name] for record in seen[1:] for name in ("snapshot", "audit", "search"))
    assert figures["elapsed_seconds"] == sum(elapsed)
    assert figures["overhead_share"] == own / sum(elapsed)
    copied = copy.deepcopy(optimizer)
    copied.bind(lambda: 0.0)
    copied.param_groups[0]["params"][0].grad = torch.ones(2)
    copied.step()
    assert "elapsed" not in copied.last.seconds


def test_a_summary_of_nothing() -> None:
    """Before the first step rates are unknown, not an error."""
    figures = run(0).summary()
    assert figures["steps"] == 0
    assert figures["trigger_rate"] is None
    assert figures == summarise([])


def test_a_torn_last_line_is_left_out(tmp_path) -> None:
    """Cut anywhere in its last line, a log gives all earlier records, and the last one only if it is whole."""
    path = tmp_path / "run.jsonl"
    run(4, log=path)
    data, whole = path.read_bytes(), read_log(path)
    start = data.rfind(b"\n", 0, len(data) - 1) + 1
    torn = tmp_path / "torn.jsonl"
    for end in range(start, len(data) + 1):
        torn.write_bytes(data[:end])
        expected = whole if end >= len(data) - 1 else whole[:-1]
        assert read_log(torn) == expected, end


def test_a_log_torn_inside_a_multibyte_character(tmp_path) -> None:
    """A cut through a non-ASCII name is a torn line like any other."""
    path = tmp_path / "run.jsonl"
    header = json.dumps({"step_optim": 1})
    record = StepRecord(0, Action.COMMIT, Movement(0.1, {"é": 0.1}), Movement(0.1), Limits(mean=1.0))
    line = json.dumps(record.to_dict(), ensure_ascii=False)
    data = f"{header}\n{line}\n{line}".encode()
    path.write_bytes(data[: data.rfind("é".encode()) + 1])
    assert len(read_log(path)) == 1


def test_a_corrupted_middle_line_is_refused(tmp_path) -> None:
    """Anything unreadable before the last line is an error with the file and the line number."""
    path = tmp_path / "run.jsonl"
    run(4, log=path)
    lines = path.read_text().splitlines()
    for bad in ('{"step": 1, "act', "[1, 2]", "", "\x00\x00\x00"):
        path.write_text("\n".join([*lines[:2], bad, *lines[3:]]) + "\n")
        with pytest.raises(ValueError, match=r"run\.jsonl, line 3 is no JSON object"):
            read_log(path)


def test_a_newer_schema_is_refused(tmp_path) -> None:
    """A log of a later schema says to upgrade."""
    path = tmp_path / "run.jsonl"
    path.write_text('{"step_optim": 99}\n')
    with pytest.raises(ValueError, match="schema 99, this version reads up to 1; upgrade"):
        read_log(path)


def test_a_resumed_segment_supersedes(tmp_path) -> None:
    """Steps that a resumed run repeats replace those after its checkpoint; steps that it never reached are gone too."""
    path = tmp_path / "run.jsonl"
    weight = torch.nn.Parameter(torch.zeros(2))
    before = weight.detach().clone()

    def make() -> STEPOptimizer:
        return STEPOptimizer(
            torch.optim.SGD([weight], lr=1.0), kl=lambda: ((weight - before) ** 2).sum(), budget=10.0, log=path
        )

    first = make()
    advance(first, weight, before, 3)
    checkpoint, kept = copy.deepcopy(first.state_dict()), weight.detach().clone()
    advance(first, weight, before, 4)
    with torch.no_grad():
        weight.copy_(kept)
    second = make()
    second.load_state_dict(checkpoint)
    second.note(resumed=True)
    advance(second, weight, before, 2)
    trace = read_trace(path)
    assert [record.step for record in trace.records] == [0, 1, 2, 3, 4]
    assert [record.notes.get("resumed") for record in trace.records] == [None, None, None, True, None]
    assert path.read_text().count('"step_optim"') == 2
    assert timeless(summarise(trace.records)) == timeless(second.summary())
    assert summarise(trace.records)["inner_seconds"] > second.summary()["inner_seconds"]


def test_a_torn_line_is_cut_before_a_new_segment(tmp_path) -> None:
    """A run that resumes on a torn log leaves a log that reads from end to end."""
    path = tmp_path / "run.jsonl"
    run(3, log=path)
    path.write_bytes(path.read_bytes()[:-7])
    run(2, log=path)
    assert [record.step for record in read_log(path)] == [0, 1]
    assert all(strict(line) for line in path.read_text().splitlines())


def test_a_log_torn_in_its_header(tmp_path) -> None:
    """A run killed while it wrote the very first line leaves a file that reads as empty and can be written on."""
    path = tmp_path / "run.jsonl"
    run(1, log=path)
    header = path.read_bytes().splitlines()[0]
    for end in range(0, len(header), 17):
        path.write_bytes(header[:end])
        assert read_log(path) == []
        run(1, log=path)
        assert len(read_log(path)) == 1


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path) -> None:
    """A record that was read before a log is written on is read afterwards."""
    path = tmp_path / "run.jsonl"
    run(3, log=path)
    path.write_bytes(path.read_bytes()[:-1])
    assert [record.step for record in read_log(path)] == [0, 1, 2]
    JSONLWriter(path, dict)(dataclasses.replace(read_log(path)[-1], step=3))
    assert [record.step for record in read_log(path)] == [0, 1, 2, 3]


def test_a_record_is_one_write_of_a_whole_line(tmp_path, monkeypatch) -> None:
    """Between two writes there are whole lines only; the header comes with the first record."""
    path, writes = tmp_path / "run.jsonl", []
    append = telemetry._append
    monkeypatch.setattr(telemetry, "_append", lambda file, data: writes.append(data) or append(file, data))
    run(3, log=path)
    assert [write.count(b"\n") for write in writes] == [2, 1, 1]
    assert all(write.endswith(b"\n") for write in writes)
    assert b"".join(writes) == path.read_bytes()


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_ends_half_way_is_cut_off_before_the_next(tmp_path, monkeypatch, failing, error) -> None:
    """A disk that was full for a while costs the records of that while, the header excepted, and glues nothing."""
    path = tmp_path / "run.jsonl"
    writer, whole = JSONLWriter(path, lambda: {"who": "test"}), telemetry._append
    record = StepRecord(0, Action.COMMIT, Movement(0.1), Movement(0.1), Limits(mean=1.0))

    def half(file, data) -> None:
        file.write(data[: len(data) // 2 + 20])
        raise error

    for step in range(3):
        monkeypatch.setattr(telemetry, "_append", half if step == failing else whole)
        with pytest.raises(type(error)) if step == failing else contextlib.nullcontext():
            writer(dataclasses.replace(record, step=step))
        assert [r.step for r in read_log(path)] == [s for s in range(step + 1) if s != failing]
    assert all(strict(line) for line in path.read_text().splitlines())
    assert read_trace(path).header["who"] == "test"


@pytest.mark.parametrize("line", ["{}", '{"step": "x", "action": "commit"}', '{"step_optim": "new"}', "[" * 100_000])
def test_a_line_that_is_no_record_is_refused_by_its_number(tmp_path, line) -> None:
    """Valid JSON that is not ours, and what no JSON reader takes, are errors that name the place."""
    path = tmp_path / "run.jsonl"
    run(2, log=path)
    path.write_text(path.read_text() + line + "\n" + path.read_text().splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl.*(line 4|schema 'new')"):
        read_log(path)


@pytest.mark.parametrize("content", ["my thesis\n", '{"epoch": 1}\n', "\x00\x01"])
def test_a_foreign_file_is_refused(tmp_path, content) -> None:
    """A path that holds something else is refused at construction, and keeps its bytes."""
    path = tmp_path / "run.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"log=.*run\.jsonl.* exists and is no step_optim log; choose another path"):
        run(1, log=path)
    assert path.read_text() == content


def test_an_unwritable_path_is_refused_before_any_step(tmp_path) -> None:
    """A directory in the place of the log is an error at construction."""
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        run(1, log=tmp_path)


def test_a_tracker_gets_flat_scalars() -> None:
    """Anything with log(dict, step=...) is called once a step with numbers under readable names."""

    class Tracker:
        def __init__(self) -> None:
            self.calls: list[tuple[dict, int]] = []

        def log(self, values: dict, step: int | None = None) -> None:
            self.calls.append((values, step))

    tracker = Tracker()
    optimizer = run(4, log=tracker)
    assert [step for _, step in tracker.calls] == [0, 1, 2, 3]
    last = tracker.calls[-1][0]
    assert last["step_optim/candidate/slices/a"] == optimizer.last.candidate.slices["a"]
    assert last["step_optim/reward"] == 3.0
    assert last["step_optim/action"] == str(optimizer.last.action)
    assert all(isinstance(value, (int, float, str)) for value in last.values())


def test_a_callable_gets_the_dictionary_and_the_step() -> None:
    """A function is called with (dict, step); the dictionary is strict JSON and the full record."""
    calls: list[tuple[dict, int]] = []
    optimizer = run(3, log=lambda values, step: calls.append((values, step)))
    assert [step for _, step in calls] == [0, 1, 2]
    assert same(StepRecord.from_dict(strict(json.dumps(calls[-1][0], allow_nan=False))), optimizer.last)


def test_a_step_that_failed_is_logged_too(tmp_path) -> None:
    """The record of a step that raised says what went wrong, reads back, and counts as an error."""
    path = tmp_path / "run.jsonl"
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=lambda: 1 / 0, budget=1.0, log=path)
    weight.grad = torch.ones(2)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    (record,) = read_log(path)
    assert record.error == "ZeroDivisionError: division by zero"
    assert not record.success
    assert record.action is Action.REJECT
    assert math.isnan(record.candidate.mean)
    assert summarise([record])["errors"] == 1


def test_a_value_that_is_no_json_is_refused_when_it_is_noted(tmp_path) -> None:
    """A tensor in note() fails there, or is written as a number; it never breaks the step that follows."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=lambda: 0.0, budget=1.0, log=tmp_path / "a.jsonl")
    try:
        optimizer.note(loss=torch.tensor(0.5))
    except (TypeError, ValueError):
        return
    weight.grad = torch.ones(2)
    optimizer.step()
    assert read_log(tmp_path / "a.jsonl")[0].notes == {"loss": 0.5}


@given(value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_notes_that_are_not_finite_are_written(value) -> None:
    """NaN and infinities in notes and rewards do not break the log; the reward comes back as the float that it was."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=lambda: 0.0, budget=1.0, log=path)
        weight.grad = torch.ones(2)
        optimizer.note(reward=value, entropy=value)
        optimizer.step()
        (record,) = read_log(path)
    assert repr(record.reward) == repr(value)
    assert float(record.notes["entropy"]) == pytest.approx(value, nan_ok=True)


def test_notes_belong_to_one_step() -> None:
    """What was noted goes into the next record and into no other."""
    seen: list[dict] = []
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0), kl=lambda: 0.0, budget=1.0, log=lambda values, step: seen.append(values)
    )
    optimizer.note(reward=1.0, success=False, tag="x")
    for _ in range(2):
        weight.grad = torch.ones(2)
        optimizer.step()
    assert [(values["reward"], values["success"], values["notes"]) for values in seen] == [
        (1.0, False, {"tag": "x"}),
        (None, True, {}),
    ]


def test_record_of_a_shrunk_step() -> None:
    """Each field of the record of an interpolated step says what happened."""
    optimizer = run(5, budget=0.06, controller=None)
    record = optimizer.last
    assert record.action is Action.SHRINK
    assert record.triggered
    assert record.bound == "mean"
    assert record.candidate.mean > 0.06 >= record.accepted.mean
    assert 0 < record.alpha < 1
    assert record.alpha_realised == pytest.approx(record.alpha, rel=1e-5)
    assert record.trials[-1].alpha is not None
    assert any(trial.alpha == record.alpha and trial.feasible for trial in record.trials)
    assert record.audits == 1 + len(record.trials)
    assert record.update_norm == pytest.approx(math.hypot(0.2, 0.02), rel=1e-5)
    assert record.lr == (1.0,)
    assert record.budget == Limits(mean=0.06)
    assert set(record.seconds) == {"inner", "snapshot", "audit", "search", "elapsed"}
    assert record.seconds["search"] > 0
    assert record.reference_drift is None
    assert record.reward == 4.0


def test_record_of_a_rejected_step() -> None:
    """A gate's rejection: alpha 0, nothing accepted, no trials."""
    record = run(5, budget=0.05, controller=Gate()).last
    assert record.action is Action.REJECT
    assert (record.alpha, record.alpha_realised, record.accepted.mean, record.trials) == (0.0, 0.0, 0.0, ())
    assert record.candidate.mean > 0.05


KILLED = """
    import os, signal, sys, torch
    from step_optim import STEPOptimizer
    weight = torch.nn.Parameter(torch.zeros(2))
    calls = 0
    def kl():
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            {end}
        return 0.01
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=kl, budget=1.0, log=sys.argv[1])
    while True:
        weight.grad = torch.ones(2)
        optimizer.step()
        print(optimizer.last.step, flush=True)
"""


@pytest.mark.parametrize(
    ("end", "code"), [("os._exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -int(signal.SIGKILL))]
)
def test_a_killed_run_loses_the_step_in_flight_at_most(tmp_path, end, code) -> None:
    """Killed inside an audit, without a chance to flush or close: every finished step is in the log."""
    path, script = tmp_path / "run.jsonl", tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED.format(end=end)))
    done = subprocess.run(
        [sys.executable, str(script), str(path), "7"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    finished = [int(line) for line in done.stdout.split()]
    assert finished == [0, 1, 2, 3, 4]
    assert [record.step for record in read_log(path)] == finished
    run(1, log=path)  # the log can be gone on with


def test_nothing_is_written_before_the_first_step(tmp_path) -> None:
    """Building an optimizer does not start a segment in its log."""
    path = tmp_path / "run.jsonl"
    run(2, log=path)
    data = path.read_bytes()
    run(0, log=path)
    assert path.read_bytes() == data


def test_two_writers_in_one_process_end_in_one_readable_log(tmp_path) -> None:
    """A run, closed and continued by another writer, reads as segments in order."""
    path = tmp_path / "run.jsonl"
    record = StepRecord(0, Action.COMMIT, Movement(0.1), Movement(0.1), Limits(mean=1.0))
    for _ in range(2):
        writer = JSONLWriter(path, lambda: {"who": "test"})
        writer(record)
    assert len(read_log(path)) == 1
    assert read_trace(path).header["who"] == "test"
