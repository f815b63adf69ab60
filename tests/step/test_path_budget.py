"""Budget(path=): the sum of all committed movements stays within its caps."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_optim import Budget, Gate, Interpolate, STEPOptimizer, read_log
from step_optim.controllers import Action
from step_optim.telemetry.record import StepRecord
from tests.strategies import bits, controllers, policy_problem, token_problem, wrap


def train(problem, optimizer, steps) -> list[StepRecord]:
    records = []
    for step in steps:
        problem.backward(step)
        optimizer.step()
        records.append(optimizer.last)
    return records


def lengths(records) -> dict[str, float]:
    """Path length by brute force: of the mean (its name is empty) and of each slice, after the last of some records."""
    total = {"": 0.0}
    for record in records:
        total[""] += record.accepted.mean
        for name, kl in record.accepted.slices.items():
            total[name] = total.get(name, 0.0) + kl
    return total


caps = st.floats(-6, 0).map(lambda exponent: 10.0**exponent)


@pytest.mark.filterwarnings("ignore:budget.path", "ignore:.*steps in a row", "ignore:.*limits slices of few")
@pytest.mark.filterwarnings("ignore:.*rounding", "ignore:PolicyKL has no pool", "ignore:TokenKL has no pool")
@settings(max_examples=25)
@given(
    build=st.sampled_from([token_problem, policy_problem]),
    controller=controllers(),
    mean=st.none() | caps,
    path=caps,
    of_slice=st.none() | caps,
    confidence=st.none() | st.just(0.6),
    stop=st.integers(0, 7),
)
def test_the_path_never_exceeds_its_caps(build, controller, mean, path, of_slice, confidence, stop) -> None:
    """By any controller, over a resume; each step's limits are what the definition says."""
    name = "b" if confidence else "a"
    by_slice = None if of_slice is None else {name: of_slice}
    budget = Budget(mean=mean, path=path, path_slices=by_slice, confidence=confidence)
    if confidence and build is policy_problem:
        budget = Budget(mean=mean, path=path, path_slices=by_slice)
    problem = build(3)
    optimizer = wrap(problem, budget, controller)
    records = train(problem, optimizer, range(stop))
    saved = copy.deepcopy((problem.model.state_dict(), optimizer.state_dict()))
    problem = build(3)
    optimizer = wrap(problem, budget, controller)
    problem.model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    records += train(problem, optimizer, range(stop, 8))
    before = {"": 0.0}
    for i, record in enumerate(records):
        left = path - before[""]
        allowed = min(math.inf if mean is None else mean, left)
        assert record.budget.mean == pytest.approx(allowed, rel=1e-9, abs=2e-6 * path)
        assert record.budget.mean <= max(allowed, 0.0) + math.ulp(path)
        assert record.accepted.mean <= record.budget.mean
        assert ("mean" in record.budget.lowered) == (record.budget.mean < (math.inf if mean is None else mean))
        if record.bound is not None:
            kind = {"mean": "path", f"slice:{name}": f"path:{name}"}
            assert record.bound not in record.budget.lowered
            assert record.bound not in kind or kind[record.bound] not in record.budget.lowered
        before = lengths(records[: i + 1])
        assert before[""] <= path
        assert of_slice is None or before[name] <= of_slice
    figures = optimizer.summary()
    assert figures["path_length"] == before[""]
    assert figures["path_length_by_slice"] == {name: kl for name, kl in before.items() if name}


def line(budget, controller=None, **options):
    """One weight, which each step proposes to move by as far again; K is the square of the movement."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    start = torch.zeros(1, dtype=torch.float64)

    def moved():
        kl = ((weight - start) ** 2).sum()
        return {"mean": kl, "a": kl, "b": 0 * kl}

    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0), kl=moved, budget=budget, controller=controller, **options
    )

    def step(size: float) -> StepRecord:
        start.copy_(weight.detach())
        weight.grad = torch.full_like(weight, -size)
        optimizer.step()
        assert optimizer.last is not None
        return optimizer.last

    return optimizer, step


@pytest.mark.filterwarnings(
    "ignore:budget.path", "ignore:.*steps in a row", "ignore:the budget limits", "ignore:FunctionKL"
)
@given(
    controller=controllers().filter(lambda controller: not controller.needs_logits),
    path=caps,
    mean=caps,
    still=st.none() | st.just(0.0),
    sizes=st.lists(st.floats(-1, 1), min_size=1, max_size=12),
)
def test_plain_functions_are_held_to_the_path_too(controller, path, mean, still, sizes) -> None:
    """Also beside a slice that may not move at all, and does not."""
    by_slice = {"a": path / 2} | ({} if still is None else {"b": still})
    _, step = line(Budget(mean=mean, path=path, path_slices=by_slice), controller)
    records = [step(size) for size in sizes]
    total = lengths(records)
    assert total[""] <= path
    assert total.get("a", 0.0) <= path / 2
    assert all(record.accepted.mean <= record.budget.mean <= mean for record in records)


def test_a_record_names_the_path_where_it_bound(tmp_path) -> None:
    """In the record, the summary and the log; with the limit that was in force."""
    optimizer, step = line(Budget(mean=0.5, path=1.0), Interpolate(), log=tmp_path / "run.jsonl")
    first, second = step(1.0), step(0.5)
    assert (first.bound, first.budget.mean, first.budget.lowered) == ("mean", 0.5, ())
    assert first.budget.path == 1.0
    third = step(1.0)
    left = 1.0 - (first.accepted.mean + second.accepted.mean)
    assert (third.bound, third.budget.mean, third.budget.lowered) == ("path", left, ("mean",))
    assert optimizer.summary()["bound"] == {"mean": 1, "path": 1}
    assert read_log(tmp_path / "run.jsonl") == [first, second, third]


def test_an_old_record_has_no_cap_on_the_path() -> None:
    _, step = line(Budget(mean=0.5))
    plain = step(0.1).to_dict()
    for name in ("path", "path_slices", "lowered"):
        del plain["budget"][name]
    assert StepRecord.from_dict(plain).budget == Budget(mean=0.5).at(0)


@pytest.mark.parametrize("controller", [Gate(), Interpolate(), Gate(patience=1)])
def test_a_used_up_path_is_told_once_and_ends_all_movement(controller) -> None:
    """With the cap, the length and the remedy, and no search any more; a higher cap lets steps through again."""
    optimizer, step = line(Budget(path_slices={"a": 0.25}), controller)
    step(0.5)
    told = r"budget.path_slices\['a'\]=0.25 is used up: the path length of slice 'a' is 0.25 .* raise the cap: "
    with pytest.warns(UserWarning, match=told) as warned:
        records = [step(0.5) for _ in range(7)]
    assert len(warned) == 1
    assert {(record.action, record.bound, record.trials) for record in records} == {(Action.REJECT, "path:a", ())}
    assert all(record.candidate.slices["a"] == 0.25 and record.budget.slices["a"] == 0 for record in records)
    optimizer.set_budget(Budget(path_slices=0.5))
    assert step(0.25).action is Action.COMMIT


def test_a_scheduled_cap_that_is_used_up_is_told_of_once() -> None:
    """Though it is another one at every step; and once more when something was left in between."""
    caps = [0.25, 0.24, 0.23, 0.22, 0.5, 0.5, 0.5, 0.75, 0.75, 0.75]
    _, step = line(Budget(path=lambda t: caps[t]))
    step(0.5)
    with pytest.warns(UserWarning, match=r"rejected as long as that is so\. End the training here, or raise") as warned:
        records = [step(0.5) for _ in caps[1:]]
    rejected = [t for t, record in enumerate(records, 1) if record.action is Action.REJECT]
    assert rejected == [1, 2, 3, 5, 6, 8, 9]
    assert [str(each.message).partition(" ")[0] for each in warned] == [
        "budget.path=0.24",
        "budget.path=0.5",
        "budget.path=0.75",
    ]


def test_a_gate_that_is_told_to_raise_does_so_at_the_end_of_the_path() -> None:
    """And the message names the cap."""
    _, step = line(Budget(path=0.25), Gate(patience=2, on_stall="raise"))
    step(0.5)
    with pytest.warns(UserWarning, match="budget.path=0.25 is used up"):
        step(0.5)
    step(0.5)
    with pytest.raises(RuntimeError, match=r"by the cap on the path length\. .* the cap on the path, 0.25, has 0 left"):
        step(0.5)


def test_many_rejections_by_what_is_left_are_told_with_what_helps() -> None:
    _, step = line(Budget(path=1.0), Gate())
    step(0.9)
    for _ in range(4):
        step(0.5)
    with pytest.warns(
        UserWarning, match=r"by the cap on the path length\. .* moved 0.25 .* 1, has 0.19 left .* Interp"
    ):
        step(0.5)


def test_proposals_do_not_shrink_to_nothing_at_the_end_of_the_path() -> None:
    """Under adaptive_rate, so that a raised cap finds steps to commit."""
    optimizer, step = line(Budget(path=0.25), adaptive_rate=True)
    step(0.5)
    with pytest.warns(UserWarning, match="used up"):
        scales = [step(0.5).scale for _ in range(20)]
    assert min(scales) == scales[-1] == 1 / 16
    assert optimizer.state_dict()["step_optim"]["scale"] > 0


def test_what_is_left_is_not_taken_for_a_budget_below_the_noise() -> None:
    """Nor for a function that measures from a fixed reference: at the end of the path nothing else is warned of."""
    problem = policy_problem(1)
    problem.kl = type(problem.kl)(problem.kl.fn)
    assert problem.kl.noise_floor is not None
    optimizer = wrap(problem, Budget(path=1e-2), Interpolate())
    with pytest.warns(UserWarning, match="used up") as warned:
        train(problem, optimizer, range(30))
    assert [str(each.message)[:28] for each in warned] == ["budget.path=0.01 is used up:"]


def test_caps_may_be_schedules_and_a_ceiling() -> None:
    """Of the step index; an automatic budget is below them from its first step on."""
    _, step = line(Budget(path=lambda t: 0.25 * (1 + t)), Interpolate())
    first, second = step(1.0), step(1.0)
    assert first.budget.mean == 0.25
    assert second.budget.mean == 0.5 - first.accepted.mean
    optimizer, step = line(Budget.auto(warmup=8, trigger_rate=0.5, ceiling=Budget(path=0.5, path_slices={"a": 0.3})))
    with pytest.warns(UserWarning, match="used up"):
        records = [step(0.2 + 0.01 * i) for i in range(12)]
    assert records[0].budget.path == 0.5
    assert lengths(records)["a"] <= 0.3
    assert "path=0.5" in repr(optimizer.budget)


def test_a_cap_that_is_lowered_below_the_path_lets_nothing_through() -> None:
    optimizer, step = line(Budget(path=1.0))
    step(0.5)
    optimizer.set_budget(Budget(path=0.1))
    with pytest.warns(UserWarning, match="budget.path=0.1 is used up: the path length is 0.25"):
        assert step(0.1).action is Action.REJECT
    assert optimizer.last.budget.mean == 0


def test_an_infinite_cap_changes_nothing() -> None:
    """To the bit."""
    runs = []
    for budget in (Budget(mean=1e-3), Budget(mean=1e-3, path=math.inf, path_slices=math.inf)):
        problem = policy_problem(2)
        records = train(problem, wrap(problem, budget), range(5))
        runs.append((bits(problem.model.state_dict()), [r.to_dict() | {"seconds": None} for r in records]))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": -1.0}, r"budget.path=-1.0 must be a KL >= 0"),
        ({"path": math.nan}, r"budget.path=nan must be"),
        ({"path": "much"}, r"budget.path='much' is no number"),
        ({"path_slices": {"a": -1}}, r"budget.path_slices\['a'\]=-1 must be"),
        ({"path_slices": {}}, r"budget.path_slices=\{\} limits no slice"),
        ({"path": True}, r"budget.path=True is no number"),
    ],
)
def test_bad_caps_are_refused(arguments, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Budget(**arguments)


def test_an_unknown_slice_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"budget.path_slices names the unknown slice 'x'; known slices"):
        wrap(policy_problem(), Budget(path_slices={"x": 1.0}))


def test_a_budget_with_caps_on_the_path_is_a_value() -> None:
    """It compares, hashes, prints and pickles as others do."""
    budget = Budget(path=0.5)
    assert budget == Budget(path=0.5) != Budget(path=0.4)
    assert hash(budget) == hash(Budget(path=0.5))
    assert eval(repr(budget)) == budget
    assert pickle.loads(pickle.dumps(budget)) == budget
    assert budget.limits_anything
    assert not Budget(path=math.inf).limits_anything
    assert Budget(path_slices={"a": 1.0}).limited_slices(["a", "b"]) == ["a"]
    assert Budget(path=lambda step: 1.0).is_scheduled


def test_limits_of_a_resumed_run_go_on() -> None:
    """The path length is in the checkpoint."""
    optimizer, step = line(Budget(path=1.0))
    step(0.5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed, step = line(Budget(path=1.0))
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert step(0.5).budget.mean == 0.75
