"""A log as columns says what its records say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_optim.controllers import Action
from step_optim.limits import Limits
from step_optim.movement import Movement
from step_optim.telemetry.columns import FIGURES, SLICED, read_columns
from step_optim.telemetry.integrity import check, check_columns
from step_optim.telemetry.log import JSONLWriter, _fast, read_trace
from step_optim.telemetry.record import StepRecord, TrialRecord
from step_optim.telemetry.summary import Summary, summarise

FIGURE = st.one_of(st.floats(0, 10), st.sampled_from([0.0, math.inf, math.nan]))
KNOWN = st.floats(0, 1)


@st.composite
def movements(draw, names: tuple[str, ...]) -> Movement:
    """Of these slices."""
    return Movement(draw(FIGURE), {name: draw(FIGURE) for name in names})


@st.composite
def records(draw, step: int) -> StepRecord:
    """One of any kind; slices come and go."""
    names = draw(st.sampled_from([(), ("a",), ("a", "b"), ("b", "c")]))
    action, moved = draw(st.sampled_from(list(Action))), movements(names)
    slices = {name: draw(KNOWN) for name in names[:1]}
    return StepRecord(
        step,
        action,
        draw(moved),
        draw(moved),
        Limits(draw(FIGURE.filter(lambda x: x == x)), slices, draw(st.sampled_from([0.1, math.inf])), slices),
        triggered=draw(st.booleans()),
        bound=draw(st.sampled_from([None, "mean", "slice:a"])),
        alpha=draw(st.none() | KNOWN),
        progress=draw(st.none() | KNOWN),
        trials=tuple(TrialRecord(0.5, Movement(0.1), True) for _ in range(draw(st.integers(0, 2)))),
        reference_drift=draw(st.none() | moved),
        held_out=draw(st.none() | moved),
        held_out_drift=draw(st.none() | moved),
        update_norm=draw(KNOWN),
        reward=draw(st.none() | KNOWN),
        seconds={"inner": draw(KNOWN), "audit": draw(KNOWN)} | draw(st.sampled_from([{}, {"elapsed": 2.5}])),
    )


def written(path, segments: list[list[StepRecord]]):
    """A log of several segments."""
    path.unlink(missing_ok=True)
    for segment in segments:
        write = JSONLWriter(path, lambda: {"budget": "some"})
        for record in segment:
            write(record)
    return path


def figure(record: StepRecord, name: str) -> float:
    """What the oracle reads of a record."""
    found = {
        "candidate": record.candidate.mean,
        "accepted": record.accepted.mean,
        "budget": record.budget.mean,
        "audits": record.audits,
        "drift": record.reference_drift and record.reference_drift.mean,
        "cap": record.budget.drift,
        "held_out": record.held_out and record.held_out.mean,
        "held_out_drift": record.held_out_drift and record.held_out_drift.mean,
    }
    value = found[name] if name in found else getattr(record, name, record.seconds.get(name))
    return math.nan if value is None else float(value)


def of_slice(record: StepRecord, kind: str, name: str) -> float:
    """The same of a slice."""
    drift = {} if record.reference_drift is None else record.reference_drift.slices
    found = {
        "candidate": record.candidate.slices,
        "accepted": record.accepted.slices,
        "budget": record.budget.slices,
        "drift": drift,
        "cap": record.budget.drift_slices,
    }
    return found[kind].get(name, math.nan)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_columns_say_what_records_say(data, tmp_path_factory) -> None:
    """Every figure of every step, whatever was measured, also where a resumed run repeats steps."""
    first = [data.draw(records(step)) for step in range(data.draw(st.integers(1, 4)))]
    begin = data.draw(st.integers(0, len(first)))
    second = [data.draw(records(step)) for step in range(begin, begin + data.draw(st.integers(0, 3)))]
    parts = data.draw(st.sampled_from([[first, second], [[*first, *second]]]))  # resumed, or its state was loaded
    path = written(tmp_path_factory.mktemp("log") / "run.jsonl", parts)
    known, columns = read_trace(path), read_columns(path)
    assert columns.header == known.header
    assert columns.step.tolist() == [record.step for record in known.records]
    assert columns.action == [record.action.value for record in known.records]
    assert columns.bound == [record.bound for record in known.records]
    for i, record in enumerate(known.records):
        assert columns.triggered[i] == record.triggered
        assert columns.limited[i] == record.budget.limits_anything
        assert all(same(float(columns.figures[name][i]), figure(record, name)) for name in FIGURES)
        for j, name in enumerate(columns.names):
            assert all(same(float(columns.slices[kind][i, j]), of_slice(record, kind, name)) for kind in SLICED)
    assert set(columns.names) >= {name for record in known.records for name in record.candidate.slices}
    share = summarise(known.records)["overhead_share"]
    assert same(math.nan if share is None else share, pytest.approx(columns.overhead_share, nan_ok=True))


def record(step: int, **changes) -> StepRecord:
    """A committed step."""
    return replace(StepRecord(step, Action.COMMIT, Movement(0.01), Movement(0.01), Limits(mean=0.03)), **changes)


def test_path_length_is_the_sum_of_what_was_committed(tmp_path) -> None:
    """A figure that is not finite adds nothing."""
    values = (0.01, 0.0, math.nan, 0.02)
    steps = [record(i, accepted=Movement(value, {"a": 2 * value})) for i, value in enumerate(values)]
    columns = read_columns(written(tmp_path / "run.jsonl", [steps]))
    torch.testing.assert_close(columns.path, torch.tensor([0.01, 0.01, 0.01, 0.03], dtype=torch.float64))
    torch.testing.assert_close(columns.slice_paths[:, 0], 2 * columns.path)
    finite = [steps[i] for i in (0, 1, 3)]
    half = Summary()
    for each in finite[:2]:
        half = half.plus(each)
    resumed = Summary(half.state_dict()).plus(replace(finite[2], reference_drift=Movement(0.02, {"a": 0.05})))
    assert resumed.figures()["path_length"] == pytest.approx(float(columns.path[-1]))
    assert resumed.figures()["path_length_by_slice"] == {"a": pytest.approx(float(columns.slice_paths[-1, 0]))}
    assert resumed.figures()["reference_drift_by_slice"] == {"a": 0.05}
    other = record(4, accepted=Movement(0.01, {"ten_seconds": 0.02}), reference_drift=Movement(0.02, {"b": 0.1}))
    later = Summary(resumed.plus(other).state_dict()).figures()
    assert later["path_length_by_slice"]["ten_seconds"] == 0.02
    assert later["reference_drift_by_slice"] == {"b": 0.1}


def test_the_integrity_verdict_is_that_of_records(tmp_path) -> None:
    """Runs that never acted, and runs that are one; other budgets make no other run."""
    runs = {
        "one": [record(0), record(1, triggered=True, action=Action.SHRINK, alpha=0.5)],
        "same": [record(0, seconds={"audit": 1.0}), record(1, triggered=True, action=Action.SHRINK, alpha=0.5)],
        "longer": [record(0), record(1, triggered=True, action=Action.SHRINK, alpha=0.5), record(2)],
        "idle": [record(0, reward=1.0), record(1)],
        "measured": [record(i, budget=Limits(mean=math.inf), reward=2.0) for i in range(2)],
        "slices": [record(0, candidate=Movement(0.01, {"a": 0.01})), record(1)],
    }
    columns = {name: read_columns(written(tmp_path / f"{name}.jsonl", [steps])) for name, steps in runs.items()}
    found = check_columns(columns)
    assert found == check(runs)
    assert found.identical == (("one", "same"),)
    assert found.never_acted == ("idle", "slices")


@given(record=records(3))
def test_both_readers_of_json_read_the_same(record) -> None:
    """To the bit, whichever is installed; what orjson does not take, json does."""
    line = json.dumps(record.to_dict())
    assert repr(json.loads(line)) == repr(_fast(line))
    assert _fast('{"note": "\\ud83d"}') == {"note": "\ud83d"}


def test_old_and_damaged_logs(tmp_path) -> None:
    """A cap had another name; a torn last line is left out; other damage, and a log without records, are refused."""
    path = written(tmp_path / "run.jsonl", [[record(0), record(1)]])
    header, first, second = path.read_text().splitlines()
    plain = json.loads(first)
    plain["budget"]["reference"] = plain["budget"].pop("drift") and 0.25
    path.write_text("\n".join([header, json.dumps(plain), second[:50]]))
    columns = read_columns(path)
    assert (columns.step.tolist(), columns.figures["cap"].tolist()) == ([0], [0.25])
    path.write_text("\n".join([header, second[:50], first]) + "\n")
    with pytest.raises(ValueError, match="line 2 is no JSON object"):
        read_columns(path)
    path.write_text("\n".join([header, '{"step": 1}', first]) + "\n")
    with pytest.raises(ValueError, match=r"line 2 is no record of a step \(KeyError"):
        read_columns(path)
    path.write_text(header + "\n")
    with pytest.raises(ValueError, match="has no records"):
        read_columns(path)
