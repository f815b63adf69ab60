"""What a flight recorder keeps: the right steps, both ends bit for bit, in bounded space, whatever happens."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
from contextlib import nullcontext
from dataclasses import replace
from linecache import getline
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Action, Budget, Gate, Interpolate, Project, STEPOptimizer, StepRecord, read_log
from step_optim.flight import FlightRecorder, read_flight
from step_optim.flight.kept import packed
from step_optim.flight.recorder import severity
from step_optim.host.files import PARTIAL
from step_optim.limits import Limits
from step_optim.movement import Movement
from tests.faults.lines import PACKAGE, Tracer
from tests.flight.runs import outcome, recorded, same_bits, train
from tests.strategies import bits, policy_problem, wrap


class Ends:
    """The snapshot of a step whose weights are so many numbers."""

    way, spared = None, ()

    def __init__(self, size: int) -> None:
        self.parameters = [torch.arange(float(size))]

    def proposal(self):
        return [(p, p + 1) for p in self.parameters]


def record(step: int, kl: float, *, triggered: bool = True, limit: float = 0.25) -> StepRecord:
    """A step that was asked to move so far."""
    action = Action.SHRINK if triggered else Action.COMMIT
    return StepRecord(step, action, Movement(kl), Movement(0.0), Limits(mean=limit), triggered=triggered)


def take(recorder: FlightRecorder, taken: StepRecord, size: int = 4) -> None:
    recorder.take(taken, Ends(size), dict)


def line_of(file: str, line: int, _: int) -> str:
    """The text of a line of the package."""
    return getline(f"{PACKAGE}/{file}", line)


def kept_steps(folder) -> list[int]:
    return [kept.step for kept in read_flight(folder)]


def total(folder) -> int:
    return sum(path.stat().st_size for path in Path(folder).iterdir())


KLS = st.floats(0, 4) | st.sampled_from([math.nan, math.inf])

# -- which steps ------------------------------------------------------------------------------------------------------


@given(
    steps=st.lists(st.tuples(KLS, st.integers(0, 700), st.booleans()), min_size=1, max_size=12),
    room=st.integers(1_000, 20_000),
    keep=st.sampled_from(["largest", "latest"]),
    when=st.sampled_from(["triggered", "always"]),
)
def test_the_folder_never_takes_more_than_it_may(steps, room, keep, when):
    """For steps of any sizes, in any order: what is kept is what dropping the least, one by one, leaves."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        recorder = FlightRecorder(folder, max_bytes=room, keep=keep, when=when)
        replace = Path.replace
        patch.setattr(Path, "replace", lambda self, to: (replace(self, to), sizes.append(total(folder))))
        patch.setattr(recorder, "_warned", {"size"})
        expected: list[tuple] = []
        for step, (kl, size, triggered) in enumerate(steps):
            sizes: list[int] = []
            taken = record(step, kl, triggered=triggered)
            take(recorder, taken, size)
            length = len(packed(taken, {}, None, Ends(size).proposal()))
            if length <= room and (triggered or when == "always"):
                while sum(each[-1] for each in expected) + length > room:
                    expected.remove(min(expected))
                worth = (not math.isfinite(kl), kl if math.isfinite(kl) else math.inf) if keep == "largest" else ()
                expected.append((*worth, step, length))
            assert all(taken_up <= room for taken_up in [*sizes, total(folder)])
            assert kept_steps(folder) == sorted(each[-2] for each in expected)


@given(kls=st.lists(st.floats(0.01, 4), min_size=1, max_size=15), places=st.integers(1, 5))
def test_of_equal_files_it_keeps_the_largest_and_the_latest(kls, places):
    """The latest step, and the largest of all others."""
    with tempfile.TemporaryDirectory() as folder:
        length = len(packed(record(0, 0.5), {}, None, Ends(4).proposal()))
        recorder = FlightRecorder(folder, max_bytes=places * length)
        for step, kl in enumerate(kls):
            take(recorder, record(step, kl))
        *others, latest = range(len(kls))
        largest = sorted(others, key=lambda step: (kls[step], step), reverse=True)[: places - 1]
        assert kept_steps(folder) == sorted([*largest, latest])


def test_a_new_process_knows_what_the_others_are_worth(tmp_path):
    """Ranks are read from the files; one that cannot be read is dropped first."""
    length = len(packed(record(0, 0.5), {}, None, Ends(4).proposal()))
    for step, kl in enumerate([0.5, 4.0, 1.0]):
        take(FlightRecorder(tmp_path, max_bytes=3 * length), record(step, kl))
    take(FlightRecorder(tmp_path, max_bytes=3 * length), record(3, 0.1))
    assert kept_steps(tmp_path) == [1, 2, 3]
    (tmp_path / "step_00000001.pt").write_bytes(b"x" * length)
    take(FlightRecorder(tmp_path, max_bytes=3 * length), record(4, 0.1))
    assert kept_steps(tmp_path) == [2, 3, 4]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (record(0, 0.5), (False, 2.0)),
        (record(0, math.nan), (True, math.inf)),
        (StepRecord(0, Action.COMMIT, Movement(0.5, {"a": 3.0}), Movement(0.0), Limits()), (False, 3.0)),
        (
            StepRecord(
                *(0, Action.SHRINK, Movement(0.5, {"a": 3.0}), Movement(0.0)),
                Limits(mean=0.5, slices={"a": math.inf}, drift=0.25),
                candidate_drift=Movement(1.0),
            ),
            (False, 4.0),
        ),
        (
            StepRecord(
                *(0, Action.SHRINK, Movement(0.5), Movement(0.0)),
                Limits(mean=0.5, confidence=0.9),
                candidate_bounds={"mean": 1.5},
            ),
            (False, 3.0),
        ),
        (StepRecord(0, Action.REJECT, Movement(0.5), Movement(0.0), Limits(mean=0.0)), (False, math.inf)),
    ],
)
def test_how_far_a_step_went(given, expected):
    """The largest KL over its budget; bounds where they were judged; without budgets the KL; not finite first."""
    assert severity(given) == expected
    assert severity(StepRecord.from_dict(given.to_dict())) == expected


def test_a_step_that_is_too_large_is_not_kept_and_told_once(tmp_path):
    """The size and the remedy are named; what is there stays."""
    recorder = FlightRecorder(tmp_path, max_bytes=10_000)
    take(recorder, record(0, 0.5))
    with pytest.warns(UserWarning, match=r"step 1 takes 80,\d+ bytes, more than max_bytes=10,000.*max_bytes=80\d_"):
        take(recorder, record(1, 5.0), 10_000)
    take(recorder, record(2, 5.0), 10_000)
    assert kept_steps(tmp_path) == [0]


def test_foreign_files_are_left_alone(tmp_path):
    """They are neither counted nor dropped nor read."""
    foreign = dict.fromkeys(("model.pt", "step_1.pt", "step_00000001.rank1.pt", "notes"), b"x" * 9000)
    for name, data in foreign.items():
        (tmp_path / name).write_bytes(data)
    recorder = FlightRecorder(tmp_path, max_bytes=4_000)
    for step in range(4):
        take(recorder, record(step, 0.5))
    assert 3 in kept_steps(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == foreign


# -- both ends, of every kind of step ---------------------------------------------------------------------------------


def proposals(problem, optimizer, steps: int):
    """Take steps; theta_t, and the candidate that the bare optimizer makes of it in a copy."""
    for step in range(steps):
        problem.backward(step)
        previous = [p.detach().clone() for p in problem.model.parameters()]
        bare = copy.deepcopy((problem.model, optimizer.optimizer))
        for twin, p in zip(bare[0].parameters(), problem.model.parameters(), strict=True):
            twin.grad = None if p.grad is None else p.grad.clone()
        bare[1].step()
        optimizer.step()
        yield previous, [p.detach() for p in bare[0].parameters()]


CASES = {
    "committed": (math.inf, Interpolate(), Action.COMMIT),
    "shrunk": (1e-4, Interpolate(), Action.SHRINK),
    "by layer": (1e-4, Interpolate(by_layer=lambda name: 2.0 if "head" in name else 1.0), Action.SHRINK),
    "rejected": (1e-4, Gate(), Action.REJECT),
    "projected": (1e-3, Project(steps=1), Action.PROJECT),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("snapshot", ["device", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_both_ends_are_kept_bit_for_bit(tmp_path, case, snapshot, dtype):
    """theta_t, and what the inner optimizer alone makes of it; the record; the names, in the order of the tensors."""
    budget, controller, action = CASES[case]
    problem, optimizer = recorded(tmp_path, budget=budget, controller=controller, snapshot=snapshot, dtype=dtype)
    for previous, candidate in proposals(problem, optimizer, 3):
        kept = read_flight(tmp_path)[-1]
        assert same_bits(kept.previous, previous)
        assert same_bits(kept.candidate, candidate)
        assert kept.record == StepRecord.from_dict(optimizer.last.to_dict())
        assert all(tensor.device.type == "cpu" for tensor in kept.previous)
    assert action in {kept.record.action for kept in read_flight(tmp_path)}
    assert list(kept.names.values()) == list(range(len(previous)))
    assert list(kept.names) == [name for name, _ in problem.model.named_parameters()]
    plain = torch.load(kept.path, weights_only=True)
    assert plain["step_optim_flight"] == 1


def test_what_is_not_finite_is_kept(tmp_path):
    """NaN weights, which no audit saw; the record's NaN survives. What moved nothing is not kept."""
    problem, optimizer = recorded(tmp_path, when="triggered")
    problem.backward(0)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert optimizer.last.action is Action.UNCHANGED
    optimizer.param_groups[0]["lr"] = 0.05
    problem.backward(1)
    problem.model.head.weight.grad[0, 0] = math.nan
    optimizer.step()
    (kept,) = read_flight(tmp_path)
    assert kept.step == 1
    assert math.isnan(kept.record.candidate.mean)
    assert math.isnan(kept.record.update_norm)
    assert [name for name, i in kept.names.items() if kept.candidate[i].isnan().any()] == ["head.weight"]
    assert not any(tensor.isnan().any() for tensor in kept.previous)


@pytest.mark.filterwarnings("ignore:budget.path=.* is used up")
def test_what_a_used_up_path_rejects_is_kept(tmp_path):
    """Nothing of it was tried, and it can be measured and taken apart all the same."""
    problem, optimizer = recorded(tmp_path, budget=Budget(mean=1.0, path=1e-3))
    for previous, candidate in proposals(problem, optimizer, 6):
        kept = read_flight(tmp_path)[-1]
        assert same_bits(kept.previous, previous)
        assert same_bits(kept.candidate, candidate)
    assert kept.record.action is Action.REJECT
    assert kept.record.bound == "path"
    assert optimizer.remeasure(kept, [1.0]).trials[-1].movement == kept.record.candidate
    assert optimizer.attribute(kept, by="module").constraint == "mean"


def test_a_window_is_one_step(tmp_path):
    """From its beginning to its end."""
    problem, optimizer = recorded(tmp_path)
    before = [p.detach().clone() for p in problem.model.parameters()]
    with optimizer.window():
        for step in range(2):
            problem.backward(step)
            optimizer.step()
        after = [p.detach().clone() for p in problem.model.parameters()]
    (kept,) = read_flight(tmp_path)
    assert same_bits(kept.previous, before)
    assert same_bits(kept.candidate, after)


def test_tied_weights_are_kept_once(tmp_path):
    """Both names lead to one tensor; a tensor that is a view does not bring along what it is a view of."""
    torch.manual_seed(0)
    problem = policy_problem()
    model = problem.model
    model.twin = torch.nn.Linear(5, 8)
    model.twin.weight = model.body.weight
    storage = torch.randn(100_000)
    model.scalar.data = storage[5]
    optimizer = wrap(problem, math.inf, recorder=FlightRecorder(tmp_path, when="always"))
    problem.backward(0)
    optimizer.step()
    (kept,) = read_flight(tmp_path)
    assert kept.names["twin.weight"] == kept.names["body.weight"]
    assert kept.names["twin.bias"] is None
    assert kept.path.stat().st_size < 20_000


@pytest.mark.parametrize("controller", [Interpolate(), Gate()])
def test_a_recorder_changes_nothing(tmp_path, controller):
    """Weights, state, records and random streams are those of the run without it, and so is the number of audits."""
    runs, counts = [], []
    for recorder in (None, FlightRecorder(tmp_path, when="always")):
        problem = policy_problem()
        with mock.patch.object(problem.kl, "_policy", wraps=problem.kl._policy) as policy:
            runs.append(train(problem, wrap(problem, 3e-4, controller, recorder=recorder), 6))
        counts.append(policy.call_count)
    assert runs[0] == runs[1]
    assert counts[0] == counts[1] > 0
    assert len(read_flight(tmp_path)) == 6


# -- resumed runs, and copies -----------------------------------------------------------------------------------------


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    """Steps from the checkpoint on are set aside at once, and kept anew; they are those of the whole run."""
    problem, optimizer = recorded(tmp_path)
    train(problem, optimizer, 3)
    saved = copy.deepcopy((problem.model.state_dict(), optimizer.state_dict()))
    train(problem, optimizer, range(3, 6))
    whole = {kept.step: bits([*kept.previous, *kept.candidate]) for kept in read_flight(tmp_path)}
    for load in ("same", "new"):
        if load == "new":
            problem, optimizer = recorded(tmp_path)
        problem.model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
        with pytest.warns(UserWarning, match=r"had 3 kept steps from step 3 on.* in earlier-\d now"):
            train(problem, optimizer, [3])
        assert kept_steps(tmp_path) == [0, 1, 2, 3]
        train(problem, optimizer, [4, 5])
        again = {kept.step: bits([*kept.previous, *kept.candidate]) for kept in read_flight(tmp_path)}
        assert again.keys() == whole.keys()
        assert [again[step] == whole[step] for step in range(3)] == [True] * 3
    for aside in ("earlier-1", "earlier-2"):
        assert kept_steps(tmp_path / aside) == [3, 4, 5]


def test_steps_that_were_kept_on_another_way_are_set_aside(tmp_path):
    """Also if the run that was resumed keeps nothing of its own; nothing is lost."""
    recorder = FlightRecorder(tmp_path)
    for step in range(4):
        take(recorder, record(step, 0.5))
    resumed = FlightRecorder(tmp_path)
    with pytest.warns(UserWarning, match="had 2 kept steps from step 2 on"):
        take(resumed, record(2, 0.1, triggered=False))
    assert kept_steps(tmp_path) == [0, 1]
    assert kept_steps(tmp_path / "earlier-1") == [2, 3]


def test_a_new_run_in_an_old_folder_loses_nothing(tmp_path):
    """What the run before has kept is set aside, with a warning; a run after that, too."""
    for run in range(3):
        recorder = FlightRecorder(tmp_path)
        with pytest.warns(UserWarning, match=f"earlier-{run} now") if run else nullcontext():
            take(recorder, record(0, 0.5 + run))
        take(recorder, record(1, 0.5 + run))
    assert [read_flight(tmp_path / f"earlier-{n}")[0].record.candidate.mean for n in (1, 2)] == [0.5, 1.5]
    assert kept_steps(tmp_path) == [0, 1]


def test_two_optimizers_in_one_folder_are_told(tmp_path):
    """Their steps have the same names."""
    first, second = FlightRecorder(tmp_path), FlightRecorder(tmp_path)
    take(first, record(0, 0.5))
    take(second, record(1, 0.5))
    with pytest.warns(UserWarning, match=r"another optimizer writes into .*step_00000001.pt"):
        take(first, record(1, 0.6))
    take(first, record(2, 0.6))  # once


def test_a_recorder_is_one_optimizers(tmp_path):
    """Of another one's steps it would measure again in this one's model."""
    recorder = FlightRecorder(tmp_path)
    problem = policy_problem()
    optimizer = wrap(problem, 1e-3, recorder=recorder)
    with pytest.raises(ValueError, match="keeps the steps of another optimizer"):
        wrap(policy_problem(), 1e-3, recorder=recorder)
    del optimizer, problem
    wrap(policy_problem(), 1e-3, recorder=recorder)  # the other one is gone


def test_a_recorder_that_would_keep_nothing_is_told(tmp_path):
    """A budget that only measures triggers nothing."""
    with pytest.warns(UserWarning, match="use when='always'"):
        wrap(policy_problem(), math.inf, recorder=FlightRecorder(tmp_path))
    wrap(policy_problem(), math.inf, recorder=FlightRecorder(tmp_path, when="always"))


def test_a_used_up_path_does_not_drive_out_the_large_steps(tmp_path):
    """What is over a limit of nothing is not far."""
    used_up = Limits(mean=0.0, path=1.0, lowered=("mean",))
    recorder = FlightRecorder(tmp_path)
    take(recorder, record(0, 5.0, limit=0.01))
    recorder.max_bytes = int(3.5 * total(tmp_path))
    for step in range(1, 8):
        take(recorder, replace(record(step, 0.001), budget=used_up, bound="path"))
    assert kept_steps(tmp_path) == [0, 6, 7]


def test_a_folder_that_went_away_is_made_again(tmp_path):
    """And paths do not depend on where the process goes."""
    recorder = FlightRecorder(tmp_path / "flight")
    take(recorder, record(0, 0.5))
    shutil.rmtree(tmp_path / "flight")
    take(recorder, record(1, 0.5))
    assert kept_steps(tmp_path / "flight") == [1]
    assert FlightRecorder(os.path.relpath(tmp_path / "flight")).folder.is_absolute()


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_goes_on_recording(tmp_path, twin):
    """As it goes on with a log that is a path."""
    problem, optimizer = recorded(tmp_path)
    train(problem, optimizer, 2)
    copied = twin(optimizer)
    assert repr(copied._run.recorder) == repr(optimizer._run.recorder)
    before = torch.tensor(0.0)
    weight = copied.param_groups[0]["params"][0]
    copied.bind(lambda: ((weight - before) ** 2).sum().detach())
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    copied.step()
    assert kept_steps(tmp_path) == [0, 1, 2]


# -- faults -----------------------------------------------------------------------------------------------------------


def half_written(self, data):
    """A disk that is full before all is written."""
    with self.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(28, "No space left on device")


def test_a_full_disk_undoes_nothing(tmp_path, monkeypatch):
    """The error is raised after the step, which is complete and in the log; the run goes on as without a recorder."""
    folder, log = tmp_path / "flight", tmp_path / "run.jsonl"
    expected = train(*recorded(tmp_path / "undisturbed", budget=3e-4), 4)
    problem, optimizer = recorded(folder, budget=3e-4, log=log)
    train(problem, optimizer, 1)
    problem.backward(1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half_written)
        with pytest.raises(OSError, match="No space left"):
            optimizer.step()
    assert outcome(problem, optimizer) == expected[1]
    assert [r.step for r in read_log(log)] == [0, 1]
    assert train(problem, optimizer, [2, 3]) == expected[2:]
    assert kept_steps(folder) == [0, 2, 3]
    assert not list(folder.glob(f"*{PARTIAL}"))


@pytest.mark.parametrize("on_error", ["raise", "reject"])
def test_an_interrupt_while_writing(tmp_path, monkeypatch, on_error):
    """The step is complete, the file is not there, and the next step begins at the same weights."""
    problem, optimizer = recorded(tmp_path, on_error=on_error)
    problem.backward(0)

    def interrupted(self, data):
        self.open("wb").close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert optimizer.last.error is None
    assert list(tmp_path.iterdir()) == []
    train(problem, optimizer, [1])
    assert optimizer.last.step == 1
    assert kept_steps(tmp_path) == [1]


@pytest.mark.parametrize("fault", ["error", "interrupt", "signal"])
def test_faults_anywhere_in_the_recorder(tmp_path, fault):
    """The step is complete, the folder can be read, and the run goes on as if nothing had happened."""

    def hit(at=None):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        problem, optimizer = recorded(folder, budget=3e-4, max_bytes=20_000, log=folder / "run.jsonl")
        train(problem, optimizer, 2)
        problem.backward(2)
        tracer = Tracer(fault, at)
        raised = tracer.run(optimizer.step)
        assert tracer.fired == (at is not None), at
        read = at is not None and at[0][0] == "flight/kept.py"  # a file that cannot be read is dropped first
        assert raised is not None or tracer.dropped or at is None or read, at
        seen = [outcome(problem, optimizer), *train(problem, optimizer, [3])]
        assert total(folder) - (folder / "run.jsonl").stat().st_size <= 20_000
        assert kept_steps(folder)[-1] == 3
        assert [r.step for r in read_log(folder / "run.jsonl")] == [0, 1, 2, 3]
        return tracer, seen

    tracer, expected = hit()
    # What goes wrong in the reading of a file is taken for a damaged file, which goes first when room is made.
    places = [(at, 0) for at in tracer.seen if at[0].startswith("flight") and "torch.load(" not in line_of(*at)]
    assert places
    for at in random.Random(0).sample(places, min(30, len(places))):
        assert hit(at)[1] == expected, at


def test_a_step_that_fails_is_not_kept(tmp_path, monkeypatch):
    """There is no decision, and no measured candidate."""
    problem, optimizer = recorded(tmp_path, on_error="reject")
    monkeypatch.setattr(problem.kl, "audit", lambda: 1 / 0)
    monkeypatch.setattr(problem.kl, "audit_with_drift", lambda: 1 / 0)
    problem.backward(0)
    optimizer.step()
    assert "ZeroDivisionError" in optimizer.last.error
    assert read_flight(tmp_path) == []


def test_a_process_that_is_killed_while_writing(tmp_path):
    """What it has not finished is no step, and makes room for the next."""
    code = f"""
        import os, torch
        from pathlib import Path
        from tests.flight.test_recorder import FlightRecorder, record, take
        take(FlightRecorder({str(tmp_path)!r}), record(0, 0.5))
        Path.replace = lambda *_: os._exit(9)
        take(FlightRecorder({str(tmp_path)!r}), record(1, 0.5))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=300)
    assert done.returncode == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000000.pt", f"step_00000001.pt{PARTIAL}"]
    assert kept_steps(tmp_path) == [0]
    take(FlightRecorder(tmp_path), record(1, 0.5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000000.pt", "step_00000001.pt"]


# -- reading ----------------------------------------------------------------------------------------------------------


def damaged(kind: str, path: Path) -> None:
    whole = path.read_bytes()
    if kind == "torn":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "foreign":
        torch.save({"model": torch.zeros(2)}, path)
    elif kind == "renamed":
        path.rename(path.with_name("step_00000007.pt"))
    else:
        plain = torch.load(path, weights_only=True)
        plain |= {"newer": {"step_optim_flight": 2}, "no step": {"record": {}}, "one end": {"candidate": []}}[kind]
        torch.save(plain, path)


@pytest.mark.parametrize("kind", ["torn", "empty", "foreign", "renamed", "no step", "one end", "newer"])
def test_a_damaged_file_is_named(tmp_path, kind):
    """With what helps."""
    take(FlightRecorder(tmp_path), record(0, 0.5))
    damaged(kind, tmp_path / "step_00000000.pt")
    name = "step_00000007.pt" if kind == "renamed" else "step_00000000.pt"
    with pytest.raises(ValueError, match=rf"{name} .*({'upgrade it' if kind == 'newer' else 'delete it'})"):
        read_flight(tmp_path)


def test_tensors_are_read_when_they_are_asked_for(tmp_path):
    """What was dropped since is named."""
    take(FlightRecorder(tmp_path), record(0, 0.5))
    (kept,) = read_flight(str(tmp_path))
    assert torch.equal(kept.candidate[0] - kept.previous[0], torch.ones(4))
    kept.path.unlink()
    with pytest.raises(FileNotFoundError, match=r"step_00000000\.pt is not there any more"):
        kept.previous  # noqa: B018
    with pytest.raises(ValueError, match="is no folder"):
        read_flight(kept.path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"folder": 3}, TypeError, "folder=3"),
        ({"folder": ""}, TypeError, "folder=''"),
        ({"max_bytes": 0}, ValueError, "max_bytes=0"),
        ({"max_bytes": 1e9}, TypeError, "max_bytes=1000000000.0"),
        ({"max_bytes": True}, TypeError, "max_bytes=True"),
        ({"keep": "all"}, ValueError, "keep='all'"),
        ({"when": "now"}, ValueError, "when='now'"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, error, message):
    """At construction, by name."""
    with pytest.raises(error, match=message):
        FlightRecorder(**({"folder": tmp_path} | options))


def test_bad_recorders_are_refused(tmp_path):
    """A file in the place of a folder; something else."""
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        FlightRecorder(file)
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match="recorder=3 is no FlightRecorder"):
        STEPOptimizer(torch.optim.SGD([weight], lr=1.0), budget=Budget(1.0), recorder=3)
