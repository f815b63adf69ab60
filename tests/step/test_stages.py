"""Stages of training share a ledger: path and displacement over resumes, kills and new optimizers."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from step_optim import (
    Budget,
    ControlSet,
    Gate,
    Interpolate,
    Ledger,
    Project,
    Steer,
    STEPOptimizer,
    TokenKL,
    read_log,
)
from step_optim.controllers import Action
from tests import reference
from tests.hosts import rank_jobs as jobs
from tests.hosts.ranks import on_ranks
from tests.hosts.text import forget_accelerator
from tests.models import tiny_llama
from tests.strategies import INNER, Problem, bits, policy_problem, token_problem, wrap

CALM = pytest.mark.filterwarnings(
    "ignore:budget.path",
    "ignore:.*steps in a row",
    "ignore:.*limits slices of few",
    "ignore:the ledger has",
    "ignore:.*rounding",
    "ignore:PolicyKL has no pool",
    "ignore:TokenKL has no pool",
)


def still_problem(seed: int = 0, **options: Any) -> Problem:
    """Buffers stay: what forwards between two steps do to the policy is part of its displacement, and of no step."""
    problem = policy_problem(seed, **options)
    problem.model.norm.momentum = 0.0
    return problem


def policy_of(problem: Problem) -> reference.Policy:
    """What a problem's model says on its control prompts, in float64."""
    if isinstance(problem.kl, TokenKL):
        return reference.policy_of(problem.model, problem.kl.control)
    problem.model.eval()
    with torch.no_grad():
        rows = problem.kl.fn().double()
    return reference.policy_from_rows(rows, [1] * len(rows))


class Oracle:
    """A training in stages, and what its ledger has to say, by brute force: a list of movements for each stage."""

    def __init__(self, folder: str, build, controller, budget) -> None:
        self.file, self._build, self._controller, self._budget = f"{folder}/ledger.json", build, controller, budget
        self.moved: dict[str, list[Any]] = {}
        self.start = policy_of(build(3))
        self.turn = 0
        self.begin(build(3).model.state_dict())

    def begin(self, weights) -> None:
        """A new stage, with an optimizer of its own."""
        if self.moved and not self.stepped:  # resumed, and not gone on with: its later steps are of no weights
            Ledger(self.file).end_at(self.saved[1])
        self.stage = f"stage {len(self.moved)}"
        self.moved[self.stage] = []
        self.saved = copy.deepcopy((weights, None, []))
        self.initial = self.saved
        self.resume(self.saved)

    def resume(self, saved) -> None:
        """What a new process does: everything comes from the checkpoint and the ledger."""
        weights, state, moved = copy.deepcopy(saved)
        kind = sorted(INNER)[len(self.moved) % len(INNER)]
        self.problem = self._build(3, inner=kind)
        self.problem.model.load_state_dict(weights)
        ledger = Ledger(self.file, stage=self.stage)
        self.optimizer = wrap(self.problem, self._budget, self._controller, ledger=ledger)
        if state is not None:
            self.optimizer.load_state_dict(state)
        self.moved[self.stage], self.stepped = moved, False

    def save(self) -> None:
        state = self.problem.model.state_dict(), self.optimizer.state_dict(), self.moved[self.stage]
        self.saved = copy.deepcopy(state)

    def do(self, what: str) -> None:
        if what == "step":
            self.turn += 1
            self.problem.backward(self.turn)
            self.optimizer.step()
            self.moved[self.stage].append(self.optimizer.last.accepted)
            self.stepped = True
            self.check()
        elif what == "save":
            self.save()
        elif what == "resume":
            self.resume(self.saved)
        elif what == "restart":
            self.resume(self.initial)
        else:
            self.begin(self.problem.model.state_dict())

    def length(self, stage: str, slice_: str | None = None) -> float:
        total = 0.0
        for moved in self.moved[stage]:
            total += moved.mean if slice_ is None else moved.slices[slice_]
        return total

    def check(self) -> None:
        """Hold the file against the oracle, and both against the caps."""
        stages = {entry["stage"]: entry for entry in Ledger(self.file).figures()["stages"]}
        stepped = {stage for stage, moved in self.moved.items() if moved}
        assert set(stages) == stepped
        for stage in stepped:
            assert stages[stage]["steps"] == len(self.moved[stage])
            assert stages[stage]["path"] == self.length(stage)
            for name, kl in stages[stage]["path_slices"].items():
                assert kl == self.length(stage, name)
        figures = Ledger(self.file).figures()
        assert figures["path"] == pytest.approx(sum(map(self.length, stepped)), rel=1e-12)
        assert figures["path"] <= self._budget.path
        assert figures["path_slices"]["a"] <= self._budget.path_slices["a"]
        moved = reference.movement(policy_of(self.problem), self.start, {})
        assert figures["displacement"] == reference.near(moved.mean, 1e-3)
        assert moved.mean <= self._budget.drift * (1 + 1e-3) + reference.rounding(moved.mean)


caps = st.floats(-5, -1).map(lambda exponent: 10.0**exponent)


@CALM
@settings(max_examples=25)
@given(
    build=st.sampled_from([token_problem, still_problem]),
    controller=st.sampled_from([Gate(), Interpolate(), Steer(corrections=1), Project(steps=1)]),
    path=caps,
    of_slice=caps,
    drift=caps,
    story=st.lists(
        st.sampled_from(["step", "step", "step", "save", "resume", "restart", "stage"]), min_size=1, max_size=14
    ),
)
def test_the_ledger_is_the_sum_of_what_happened(build, controller, path, of_slice, drift, story) -> None:
    """Nothing is counted twice, nothing is lost, and caps on path and displacement hold over all of it."""
    with tempfile.TemporaryDirectory() as folder:
        budget = Budget(path=path, path_slices={"a": of_slice}, drift=drift)
        run = Oracle(folder, build, controller, budget)
        for what in [*story, "step"]:
            if what == "stage" and not run.moved[run.stage]:
                continue
            run.do(what)


def stage(problem, folder, name, budget=None, **options) -> STEPOptimizer:
    """A new optimizer over a problem's weights."""
    origin = options.pop("origin", "first")
    problem.optimizer = torch.optim.AdamW([p for p in problem.model.parameters() if p.requires_grad], lr=0.05)
    ledger = Ledger(Path(folder) / "ledger.json", stage=name, origin=origin)
    return wrap(problem, budget or Budget(mean=1e-3), Interpolate(), ledger=ledger, **options)


def train(problem, optimizer, count: int = 3) -> None:
    for step in range(count):
        problem.backward(step)
        optimizer.step()


def again(problem, build=still_problem):
    """The same weights in a new process."""
    other = build(0)
    other.model.load_state_dict(problem.model.state_dict())
    return other


def test_the_next_stage_may_load_the_optimizer_of_the_one_before(tmp_path) -> None:
    """Its moments go on; its path length is in its own entry, and not in the new one."""
    first = still_problem()
    optimizer = stage(first, tmp_path, "sft")
    train(first, optimizer)
    second = again(first)
    later = stage(second, tmp_path, "dpo")
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = later.optimizer.state[second.model.body.weight]
    assert state["step"] == 3
    train(second, later, 2)
    sft, dpo = Ledger(tmp_path / "ledger.json").stages
    assert (sft.steps, dpo.steps, later.last.step) == (3, 2, 1)
    assert dpo.path == later.summary()["path_length"] > 0


def test_a_stage_without_its_checkpoint_is_told_that_its_path_is_lost(tmp_path) -> None:
    """Once, by the first step that counts; a checkpoint says better, but for that of step 0."""
    problem = still_problem()
    optimizer = stage(problem, tmp_path, "sft")
    at_0 = copy.deepcopy(optimizer.state_dict())
    train(problem, optimizer)
    length = Ledger(tmp_path / "ledger.json").stages[0].path
    moved = again(problem)
    restarted = stage(moved, tmp_path, "sft")
    moved.backward(0)
    told = f"has 3 steps of stage 'sft', path length {length:.3g}, .* load the optimizer's state_dict .* 'sft-2' say"
    with pytest.warns(UserWarning, match=told):
        restarted.step()
    train(moved, restarted, 2)
    fresh = still_problem()
    resumed = stage(fresh, tmp_path, "sft")
    resumed.load_state_dict(at_0)
    with pytest.warns(UserWarning, match="has 3 steps of stage 'sft'"):
        train(fresh, resumed, 1)
    assert Ledger(tmp_path / "ledger.json").stages[0].steps == 1


def test_a_restart_under_accelerate_is_told_too(tmp_path) -> None:
    """Its wrapper loads the optimizer's own state into it, which is no resume."""
    problem = still_problem()
    train(problem, stage(problem, tmp_path, "sft"))
    moved = again(problem)
    optimizer = Accelerator(cpu=True).prepare(stage(moved, tmp_path, "sft"))
    moved.backward(0)
    with pytest.warns(UserWarning, match="has 3 steps of stage 'sft'"):
        optimizer.step()
    forget_accelerator()


def test_a_policy_of_another_ledger_is_refused(tmp_path) -> None:
    """The ledger was deleted, and its pi_ref forgotten: drift would be from another training."""
    problem = still_problem()
    train(problem, stage(problem, tmp_path, "sft"))
    (tmp_path / "ledger.json").unlink()
    with pytest.raises(ValueError, match=r"ledger.pi_ref.pt is the pi_ref of another ledger .* Delete it"):
        stage(still_problem(seed=5), tmp_path, "sft")
    (tmp_path / "ledger.pi_ref.pt").unlink()
    other = still_problem(seed=5)
    train(other, stage(other, tmp_path, "sft"), 1)
    first = Ledger(tmp_path / "ledger.json").stages[0]
    assert first.displacement == pytest.approx(first.path, rel=1e-3)


def test_a_policy_that_was_left_behind_is_refused_after_a_checkpoint(tmp_path) -> None:
    """The checkpoint has a pi_ref, so that the KL closure asks for none: the first stage would not save its own."""
    problem, other, bare = still_problem(), still_problem(seed=5), still_problem(seed=5)
    train(problem, stage(problem, tmp_path, "sft"))
    (tmp_path / "ledger.json").unlink()
    before = wrap(bare, 1e-3)
    train(bare, before, 1)
    kl, other.kl = other.kl, None
    optimizer = stage(other, tmp_path, "sft")
    optimizer.load_state_dict(before.state_dict())
    optimizer.bind(kl)
    other.backward(0)
    with pytest.raises(ValueError, match=r"ledger\.pi_ref\.pt is the pi_ref of another ledger .* Delete it"):
        optimizer.step()
    (tmp_path / "ledger.pi_ref.pt").unlink()
    optimizer.step()
    assert (tmp_path / "ledger.pi_ref.pt").exists()


def test_a_function_that_measures_no_displacement_leaves_none(tmp_path) -> None:
    """Bound in the middle of a stage: what was known is of another policy by now."""
    problem = still_problem()
    optimizer = stage(problem, tmp_path, "sft")
    train(problem, optimizer, 1)
    assert Ledger(tmp_path / "ledger.json").stages[0].displacement is not None
    optimizer.bind(lambda: 0.0)
    train(problem, optimizer, 1)
    assert Ledger(tmp_path / "ledger.json").stages[0].displacement is None


def test_a_kill_between_both_files_can_go_on(tmp_path) -> None:
    """The ledger comes first: without its pi_ref the first stage saves one anew."""
    problem = still_problem()
    optimizer = stage(problem, tmp_path, "sft")
    train(problem, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    (tmp_path / "ledger.pi_ref.pt").unlink()
    resumed = stage(again(problem), tmp_path, "sft")
    resumed.load_state_dict(saved)
    moved = again(problem)
    resumed = stage(moved, tmp_path, "sft")
    resumed.load_state_dict(saved)
    train(moved, resumed, 1)
    assert (tmp_path / "ledger.pi_ref.pt").exists()
    assert Ledger(tmp_path / "ledger.json").stages[0].steps == 2


@pytest.mark.parametrize("data", [b"", b"garbage", None, "other"])
def test_a_damaged_policy_is_named(tmp_path, data) -> None:
    """With what can be done."""
    problem = still_problem()
    train(problem, stage(problem, tmp_path, "sft"))
    file = tmp_path / "ledger.pi_ref.pt"
    if data == "other":
        torch.save({"weight": torch.zeros(2)}, file)
    else:
        file.write_bytes(file.read_bytes()[:-100] if data is None else data)
    with pytest.raises(ValueError, match=r"ledger.pi_ref.pt, a ledger's pi_ref, is damaged or another file"):
        stage(again(problem), tmp_path, "dpo")


def test_a_resumed_stage_measures_from_where_it_did(tmp_path) -> None:
    """What was bound with origin="now" is from there still, and has its star."""
    first = still_problem()
    train(first, stage(first, tmp_path, "sft"))
    second = again(first)
    optimizer = stage(second, tmp_path, "dpo")
    optimizer.bind(second.kl, origin="now")
    train(second, optimizer, 2)
    assert [each.origin for each in Ledger(tmp_path / "ledger.json").stages] == ["first", "own"]
    saved = copy.deepcopy(optimizer.state_dict())
    for bound_first in (True, False):
        third = again(second)
        resumed = stage(third, tmp_path, "dpo")
        if not bound_first:
            ledger = Ledger(tmp_path / "ledger.json", stage="dpo")
            resumed = STEPOptimizer(third.optimizer, budget=1e-3, ledger=ledger)
        resumed.load_state_dict(copy.deepcopy(saved))
        if not bound_first:
            resumed.bind(third.kl)
        train(third, resumed, 1)
        stages = Ledger(tmp_path / "ledger.json").stages
        assert [each.origin for each in stages] == ["first", "own"]
        assert stages[-1].displacement == resumed.last.reference_drift.mean


def test_displacement_stays_known_where_a_step_fails(tmp_path, monkeypatch) -> None:
    """It moved nothing."""
    problem = still_problem()
    optimizer = stage(problem, tmp_path, "sft", on_error="reject")
    train(problem, optimizer, 2)
    known = Ledger(tmp_path / "ledger.json").stages[0].displacement
    monkeypatch.setattr(problem.kl, "audit_with_drift", lambda: 1 / 0)
    problem.backward(2)
    optimizer.step()
    assert optimizer.last.error is not None
    entry = Ledger(tmp_path / "ledger.json").stages[0]
    assert (entry.steps, entry.displacement) == (3, known)


def test_a_stage_may_end_at_an_older_checkpoint(tmp_path) -> None:
    """The next one goes on from the weights that were best: later steps do not count."""
    problem = still_problem()
    optimizer = stage(problem, tmp_path, "sft")
    train(problem, optimizer, 2)
    best, saved = again(problem), copy.deepcopy(optimizer.state_dict())
    then = Ledger(tmp_path / "ledger.json").stages[0]
    train(problem, optimizer, 3)
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.end_at(saved)
    now = Ledger(tmp_path / "ledger.json").stages[0]
    assert (now.steps, now.path, now.path_slices) == (2, then.path, then.path_slices)
    assert (now.displacement, now.displacement_slices) == (then.displacement, then.displacement_slices)
    train(best, stage(best, tmp_path, "dpo"), 1)
    for wrong in (saved, {}, torch.optim.SGD([nn.Parameter(torch.zeros(1))]).state_dict()):
        with pytest.raises(ValueError, match=r"the checkpoint is of stage .* is 'dpo'"):
            Ledger(tmp_path / "ledger.json").end_at(wrong)


def test_steps_that_move_nothing_before_a_checkpoint_is_loaded_leave_the_entry(tmp_path) -> None:
    """torch.distributed.checkpoint takes one to create the state."""
    problem = still_problem()
    optimizer = stage(problem, tmp_path, "sft")
    train(problem, optimizer)
    before = (tmp_path / "ledger.json").read_text()
    resumed = stage(again(problem), tmp_path, "sft")
    for group in resumed.param_groups:
        group["lr"] = 0.0
    for p in resumed.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    resumed.step()
    assert resumed.last.action is Action.UNCHANGED
    assert (tmp_path / "ledger.json").read_text() == before


@pytest.mark.parametrize("build", [token_problem, still_problem])
def test_displacement_is_from_the_start_of_the_first_stage(tmp_path, build) -> None:
    """In the record of each step too, with pool and held-out prompts; also where only a later stage trains the head."""
    first = build(0, **({"freeze_head": True} if build is token_problem else {}))
    start = policy_of(first)
    for name in ("sft", "dpo", "grpo"):
        problem = again(first, build)
        problem.model.load_state_dict(first.model.state_dict())
        head = getattr(problem.model, "lm_head", None)
        if name == "sft" and head is not None:
            head.requires_grad_(False)
        optimizer = stage(problem, tmp_path, name)
        train(problem, optimizer)
        moved = reference.movement(policy_of(problem), start, {})
        assert optimizer.last.reference_drift.mean == reference.near(moved.mean, 1e-3)
        first = problem
    stages = Ledger(tmp_path / "ledger.json").stages
    assert [entry.origin for entry in stages] == ["first"] * 3
    assert stages[2].displacement == optimizer.last.reference_drift.mean
    assert dict(stages[2].displacement_slices) == optimizer.last.reference_drift.slices


CONTROL = ControlSet.from_ids(
    [[1, 2], [3, 4, 5], [6], [7, 8]], [[6, 7, 8], [9, 10], [11], [12, 13]], ["a", "a", "b", "b"]
)
OTHERS = ControlSet.from_ids([[2, 1], [9, 9]], [[3, 4], [5]])


def adapter(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=True)
    return peft.get_peft_model(model, config)


def tune(model: Any, optimizer: STEPOptimizer, count: int = 3) -> None:
    for step in range(count):
        ids = torch.randint(1, 20, (2, 6), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_adapter_is_merged_and_another_one_begun(tmp_path) -> None:
    """pi_ref is the policy before the first adapter, in the second stage too; its cap holds over both."""
    base, file = tiny_llama(), tmp_path / "ledger.json"
    start = reference.policy_of(base, CONTROL)
    lengths, model = [], base
    for seed, name in enumerate(("sft", "dpo")):
        model = adapter(model, seed)
        inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        kl = TokenKL(model, CONTROL, noise_floor=False, pool=OTHERS)
        budget = Budget(mean=5e-3, drift=8e-3)
        optimizer = STEPOptimizer(inner, kl=kl, budget=budget, controller=Interpolate(), ledger=Ledger(file, name))
        before = kl.drift().mean if kl.has_origin and kl._reference is not None else None
        assert before is None
        tune(model, optimizer)
        moved = reference.movement(reference.policy_of(model, CONTROL), start, {"a": [0, 1]})
        assert optimizer.last.reference_drift.mean == reference.near(moved.mean, 1e-3)
        assert moved.mean <= 8e-3 * 1.001
        lengths.append(optimizer.summary()["path_length"])
        model = model.merge_and_unload()
    figures = Ledger(file).figures()
    assert figures["path"] == sum(lengths)
    assert figures["displacement"] == optimizer.last.reference_drift.mean
    assert optimizer.last.previous_drift.mean > 0


def test_other_prompts_are_refused_with_the_remedies(tmp_path) -> None:
    """Which work: adapters off, now, a ledger of own origins; and the entry says what was measured from."""
    model, file = adapter(tiny_llama(), 0), tmp_path / "ledger.json"
    trained = [p for p in model.parameters() if p.requires_grad]

    def optimizer(name, kl, **options):
        inner = torch.optim.AdamW(trained, lr=0.01)
        return STEPOptimizer(inner, kl=kl, budget=Budget(mean=1e-2), ledger=Ledger(file, name, **options))

    tune(model, optimizer("sft", TokenKL(model, CONTROL, noise_floor=False)))
    kl = TokenKL(model, OTHERS, noise_floor=False)
    with pytest.raises(ValueError, match=r"pi_ref.pt, does not fit .* another control set.*adapter_off.*origin='own'"):
        optimizer("dpo", kl)
    for i, origin in enumerate(("adapter_off", "now")):
        later = optimizer(f"dpo{i}", None)
        later.bind(kl, origin=origin)
        tune(model, later)
        assert Ledger(file).stages[-1].origin == "own"
    tune(model, optimizer("grpo", TokenKL(model, OTHERS, noise_floor=False), origin="own"))
    ledger = Ledger(file)
    assert [entry.origin for entry in ledger.stages] == ["first", "own", "own", "own"]
    assert ledger.figures()["displacement"] is None
    assert str(ledger).count("*") == 1 + 3
    ended = optimizer("again", TokenKL(model, CONTROL, noise_floor=False))
    tune(model, ended)
    assert Ledger(file).figures()["displacement"] == ended.last.reference_drift.mean


def test_prompts_that_the_run_knows_may_be_kept(tmp_path) -> None:
    """bind(origin='keep') in the middle of a stage."""
    model = tiny_llama()
    kl = TokenKL(model, CONTROL, noise_floor=False)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = STEPOptimizer(inner, kl=kl, budget=1e-2, ledger=Ledger(tmp_path / "ledger.json", "sft"))
    start = reference.policy_of(model, CONTROL.select([0, 3]))
    tune(model, optimizer)
    fewer = TokenKL(model, CONTROL.select([0, 3]), noise_floor=False)
    with pytest.raises(ValueError, match="does not fit"):
        optimizer.bind(fewer)
    optimizer.bind(fewer, origin="keep")
    tune(model, optimizer)
    entry = Ledger(tmp_path / "ledger.json").stages[0]
    moved = reference.movement(reference.policy_of(model, CONTROL.select([0, 3])), start, {})
    assert entry.displacement == reference.near(moved.mean, 1e-3)
    assert entry.origin == "first"


def test_a_stage_before_that_knows_no_pi_ref_is_told_of(tmp_path) -> None:
    """A plain function measures movement alone; a closure that measures drift cannot go on from there."""
    problem = still_problem()
    plain = still_problem()
    plain.kl = lambda: 0.0
    train(plain, stage(plain, tmp_path, "sft"))
    assert Ledger(tmp_path / "ledger.json").figures()["displacement"] is None
    with pytest.raises(ValueError, match=r"ledger.pi_ref.pt is missing: .* origin='own'"):
        stage(problem, tmp_path, "dpo")
    train(problem, stage(problem, tmp_path, "dpo", origin="own"))


def test_a_run_without_a_ledger_gets_one_when_it_is_resumed(tmp_path) -> None:
    """Its whole path counts; pi_ref is the first stage's, and not the one of its checkpoint."""
    first = still_problem()
    start = policy_of(first)
    train(first, stage(first, tmp_path, "sft"))
    second = again(first)
    bare = wrap(second, Budget(mean=1e-3), Interpolate())
    train(second, bare)
    third = again(second)
    resumed = stage(third, tmp_path, "dpo")
    resumed.load_state_dict(copy.deepcopy(bare.state_dict()))
    train(third, resumed, 1)
    entry = Ledger(tmp_path / "ledger.json").stages[-1]
    moved = reference.movement(policy_of(third), start, {})
    assert entry.steps == 4
    assert entry.path > bare.summary()["path_length"]
    assert entry.displacement == reference.near(moved.mean, 1e-3)


def test_a_resumed_stage_is_the_uninterrupted_one(tmp_path) -> None:
    """To the bit, whether its KL closure is bound before or after the checkpoint is loaded."""
    found = []
    for how in ("whole", "before", "after"):
        folder = tmp_path / how
        problem = still_problem()
        train(problem, stage(problem, folder, "sft"))
        torch.manual_seed(1)
        second = again(problem)
        optimizer = stage(second, folder, "dpo")
        train(second, optimizer, 2)
        if how != "whole":
            saved, moved = copy.deepcopy(optimizer.state_dict()), again(second)
            kl = moved.kl
            if how == "after":
                moved.kl = None
            optimizer = stage(moved, folder, "dpo")
            optimizer.load_state_dict(saved)
            if how == "after":
                optimizer.bind(kl)
            second = moved
        torch.manual_seed(2)
        train(second, optimizer, 3)
        entries = [vars(entry) | {"began": "", "ended": ""} for entry in Ledger(folder / "ledger.json").stages]
        state = bits(second.model.state_dict()), bits(optimizer.state_dict()["step_optim"])
        found.append((state, optimizer.last.to_dict() | {"seconds": None}, entries))
    assert found[0] == found[1] == found[2]


def test_a_step_stands_where_the_ledger_cannot_be_written(tmp_path) -> None:
    """As with a log, which is written all the same; the next step writes both."""
    problem = still_problem()
    optimizer = stage(problem, tmp_path / "runs", "sft", log=tmp_path / "run.jsonl")
    train(problem, optimizer, 1)
    blocked = tmp_path / "runs" / "ledger.json.partial"
    blocked.mkdir()
    problem.backward(1)
    with pytest.raises(OSError, match=r"ledger\.json\.partial"):
        optimizer.step()
    assert optimizer.last.action is not Action.REJECT
    assert len(read_log(tmp_path / "run.jsonl")) == 2
    blocked.rmdir()
    train(problem, optimizer, 1)
    assert Ledger(tmp_path / "runs" / "ledger.json").stages[0].steps == 3


def test_two_runs_cannot_write_one_ledger(tmp_path) -> None:
    """Nor may a ledger be read before the stage before it has ended; nor serve two optimizers."""
    one, two = still_problem(), still_problem()
    first, early = stage(one, tmp_path, "sft"), stage(two, tmp_path, "dpo")
    train(one, first, 1)
    two.backward(0)
    with pytest.raises(RuntimeError, match=r"written by another run since Ledger\(stage='dpo'\) was made"):
        early.step()
    train(two, stage(two, tmp_path, "dpo"), 1)
    one.backward(1)
    with pytest.raises(RuntimeError, match="written by another run since the latest step of stage 'sft'"):
        first.step()
    ledger, other = Ledger(tmp_path / "other.json", "sft"), still_problem()
    train(other, wrap(other, 1e-3, ledger=ledger), 1)
    twice = wrap(still_problem(), 1e-3, ledger=ledger)
    with pytest.raises(RuntimeError, match="belongs to another optimizer already"):
        twice.step()


def test_a_copy_of_the_optimizer_keeps_the_stages_before(tmp_path) -> None:
    """Its caps are those of the whole training; and it may go on in the place of the one that was copied."""
    problem = still_problem()
    train(problem, stage(problem, tmp_path, "sft"))
    optimizer = stage(problem, tmp_path, "dpo", Budget(path=1.0))
    train(problem, optimizer, 1)
    other = copy.deepcopy(optimizer)
    assert other._run.path == optimizer._run.path
    assert other._run.path.before.mean > 0


@pytest.mark.parametrize(
    ("ledger", "error", "message"),
    [
        ("runs/ledger.json", TypeError, "ledger='runs/ledger.json' is no Ledger; give Ledger"),
        (Ledger("nowhere.json"), ValueError, "names no stage to write; give it one"),
    ],
)
def test_what_is_no_ledger_of_a_stage_is_refused(ledger, error, message) -> None:
    with pytest.raises(error, match=message):
        wrap(still_problem(), 1e-3, ledger=ledger)


def test_without_a_ledger_a_checkpoint_has_no_stage(tmp_path) -> None:
    assert "stage" not in wrap(still_problem(), 1e-3).state_dict()["step_optim"]
    assert stage(still_problem(), tmp_path, "sft").state_dict()["step_optim"]["stage"] == "sft"


def test_failed_steps_count_and_move_nothing(tmp_path) -> None:
    problem = still_problem()
    optimizer = stage(problem, tmp_path, "sft")
    train(problem, optimizer, 1)
    entry = Ledger(tmp_path / "ledger.json").stages[0]
    problem.backward(1)
    for p in problem.model.parameters():
        p.grad = None if p.grad is None else torch.full_like(p, math.nan)
    optimizer.step()
    later = Ledger(tmp_path / "ledger.json").stages[0]
    assert (later.steps, later.path, later.displacement) == (2, entry.path, entry.displacement)
    assert json.loads((tmp_path / "ledger.json").read_text())["step_optim_ledger"] == 1


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("shard", [True, False])
def test_processes_share_a_ledger(tmp_path, kind, shard) -> None:
    """The first one writes; all of them have the caps, and their own part of pi_ref."""
    options = {"kind": kind, "shard": shard, "frozen_head": kind == "fsdp"}
    results = on_ranks(jobs.in_stages, 2, folder=str(tmp_path), **options)
    assert results[0] == results[1]
    figures = Ledger(tmp_path / "ledger.json").figures()
    assert [entry["path"] for entry in figures["stages"]] == results[0]["paths"]
    assert figures["displacement"] == results[0]["drift"] > 0
    assert figures["path"] == sum(results[0]["paths"]) <= 2e-3
    assert len(list(tmp_path.glob("*.pt"))) == 1 + shard


def test_a_policy_of_another_number_of_processes_is_refused(tmp_path) -> None:
    """Each has its own observations, which one process alone does not know."""
    problem = still_problem()
    train(problem, stage(problem, tmp_path, "sft"))
    with pytest.raises(RuntimeError, match="was saved by 1 processes, and there are 2"):
        on_ranks(jobs.in_a_later_stage, 2, folder=str(tmp_path))


def test_processes_that_cannot_read_the_ledger_are_told_of(tmp_path) -> None:
    """On every process: none of them waits for another one."""
    problem = still_problem()
    train(problem, stage(problem, tmp_path / "0", "sft"))
    for message in on_ranks(jobs.apart, 2, folder=str(tmp_path)):
        assert "not all processes can read" in message
