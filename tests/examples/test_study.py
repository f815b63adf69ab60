"""The study: a killed run goes on bit for bit, conditions are paired, branches begin at one state, broken ones fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
STUDY = ROOT / "examples" / "study"
sys.path.insert(0, str(STUDY.parent))

from study.config import ARMS, BRANCHES, CONDITIONS, PLAN, PRIMARY, SMOKE, Study, run_settings  # noqa: E402
from study.running import branching, training, work  # noqa: E402
from study.running import world as worlds  # noqa: E402
from study.running.prompts import SLICES, TRAINED, UNSEEN  # noqa: E402

TINY = replace(SMOKE, updates=4, shocks=(2,))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    worlds.prepare(TINY, folder, "cpu", small=True)
    return folder


@pytest.fixture(scope="module")
def world(prepared) -> worlds.World:
    return worlds.load(TINY, prepared, "cpu", small=True)


def run(world, root: Path, arm: str, condition: str, say=lambda number: None, seed: int = 0) -> dict:
    return training.make_run(world, (arm, condition, seed), root, say)


def timeless(plain: dict) -> dict:
    """A run without its times and its random seconds."""
    plain = json.loads(json.dumps(plain))
    plain.pop("settings", None)
    for part in (*plain["records"], *plain["updates"], plain["result"]):
        part.pop("seconds")
    return plain


@pytest.mark.parametrize(
    ("arm", "condition"),
    [
        ("shocks", "project"),
        ("shocks", "ema"),
        ("shocks", "ratchet_cap"),
        ("shocks", "target_kl"),
        ("shocks", "adaptive_kl"),
        ("high_lr", "interpolate_warm"),
        ("high_lr", "gate_keep"),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(world, tmp_path, arm, condition):
    """Stopped after two updates and again in the middle of the third, it ends as the run that nobody stopped."""

    def stop(number):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "stopped", arm, condition, stop)
    folder = tmp_path / "stopped" / arm / condition / "0"
    assert not (folder / "run.json").exists()
    with (folder / "step.jsonl").open("a") as log:  # as if the third update had been cut off in its record
        log.write('{"step": 2, "action"')
    whole, stopped = (timeless(run(world, tmp_path / name, arm, condition)) for name in ("whole", "stopped"))
    assert stopped == whole
    assert [record["step"] for record in stopped["records"]] == [0, 1, 2, 3]
    assert not (folder / "checkpoint.pt").exists()
    assert (
        run(world, tmp_path / "stopped", arm, condition)["records"]
        == json.loads((folder / "run.json").read_text())["records"]
    )


def test_a_run_stopped_while_it_is_scored_is_finished(world, tmp_path, monkeypatch):
    """All updates are made and checkpointed, and no step is left to make: only the log knows the last record."""
    score = training.score

    def stop(world, model, seed):
        if (tmp_path / "stopped" / "shocks" / "gate" / "0" / "checkpoint.pt").exists():
            raise KeyboardInterrupt
        return score(world, model, seed)

    monkeypatch.setattr(training, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "stopped", "shocks", "gate")
    monkeypatch.undo()
    whole, stopped = (timeless(run(world, tmp_path / name, "shocks", "gate")) for name in ("whole", "stopped"))
    assert stopped == whole


def test_conditions_are_paired_until_their_first_different_decision(world, tmp_path):
    """Same rollouts, same proposals: up to the first trigger a gate's trace is fixed KL's, bit for bit."""
    fixed, gate = (run(world, tmp_path, "shocks", condition)["records"] for condition in ("fixed", "gate"))
    first = next(i for i, record in enumerate(gate) if record["triggered"])
    assert 0 < first < TINY.updates - 1
    for t in range(first + 1):
        assert gate[t]["candidate"] == fixed[t]["candidate"]
        assert gate[t]["reward"] == fixed[t]["reward"]
    assert gate[first]["action"] == "reject"
    assert gate[first + 1]["candidate"] != fixed[first + 1]["candidate"]


def test_every_mechanism_leaves_its_mark(world, tmp_path):
    """What a condition says is what happened: references move or are held, beta follows, minibatches are left out."""
    updates = {name: run(world, tmp_path, "shocks", name)["updates"] for name in ("ema", "adaptive_kl", "target_kl")}
    assert {update["reference"] for update in updates["ema"]} == {"moved"}
    assert len({update["beta"] for update in updates["adaptive_kl"]}) == TINY.updates
    assert any(update["minibatches"] < 4 for update in updates["target_kl"] if update["shock"])
    assert all(update["minibatches"] >= 1 for update in updates["target_kl"])
    assert [update["shock"] for update in updates["ema"]] == [t in TINY.shocks for t in range(TINY.updates)]
    assert "held" in {update["reference"] for update in run(world, tmp_path, "shocks", "ratchet_cap")["updates"]}


def test_held_out_movement_is_that_of_what_was_committed(world, tmp_path):
    """Zero after a rejection, and otherwise not that of the candidate."""
    gate = run(world, tmp_path, "high_lr", "gate")
    assert {record["action"] for record in gate["records"]} == {"reject"}
    assert {update["held"]["mean"] for update in gate["updates"]} == {0.0}
    assert gate["result"]["reward"] == gate["result"]["reward_before"]
    assert gate["result"]["drift"]["mean"] == 0
    shrunk = run(world, tmp_path, "high_lr", "interpolate")
    for record, update in zip(shrunk["records"], shrunk["updates"], strict=True):
        assert 0 < update["held"]["mean"] < record["candidate"]["mean"]
        assert set(update["held"]["slices"]) == set(SLICES)


def test_a_run_of_other_settings_is_not_continued(world, tmp_path):
    run(world, tmp_path, "nominal", "fixed")
    other = replace(world, study=replace(TINY, beta=0.2))
    with pytest.raises(ValueError, match="other settings"):
        run(other, tmp_path, "nominal", "fixed")


def test_a_folder_of_other_settings_is_refused(prepared):
    """Control sets, branches and first scores are derived from the settings, too."""
    worlds.prepare(TINY, prepared, "cpu", small=True)
    with pytest.raises(ValueError, match="holds a study of other settings"):
        worlds.prepare(replace(TINY, evaluation_samples=2), prepared, "cpu", small=True)


def test_branches_begin_at_one_state(world, tmp_path):
    """One proposal, several decisions: the figures of each are those of what it committed."""
    run(world, tmp_path, "nominal", "fixed")
    records = branching.make_branches(world, 0, 1, tmp_path, lambda number: None)
    found = {record["branch"]: record for record in records}
    assert list(found) == list(BRANCHES)
    assert len({record["reward_at"] for record in records}) == 1
    assert found["accept"]["distance_held"] == found["accept"]["distance_control"] == 0
    assert found["accept"]["control"]["mean"] > Study.budget_mean
    for name in ("shrink", "shrink_restore", "project", "project_short"):
        assert 0 < found[name]["control"]["mean"] <= Study.budget_mean
        assert found[name]["distance_held"] > 0
    for name in ("project", "project_short"):
        assert 0 < found[name]["distance_control"] <= found["shrink"]["distance_control"]
        assert found[name]["distance_control"] == pytest.approx(found[name]["projection"]["residual"], rel=1e-3)
    kept = [found[name] for name in ("shrink", "shrink_restore", "shrink_between")]
    assert len({record["control"]["mean"] for record in kept}) == len({r["reward_now"] for r in kept}) == 1
    assert len({record["control_next"]["mean"] for record in kept}) == 3
    for name in ("reject", "reject_keep"):
        assert found[name]["control"]["mean"] == found[name]["held"]["mean"] == 0
        assert found[name]["reward_now"] == found[name]["reward_at"]
    assert found["small"]["control"]["mean"] < found["rerun"]["control"]["mean"] < found["accept"]["control"]["mean"]
    assert branching.make_branches(world, 0, 1, tmp_path, lambda number: None) == records
    with pytest.raises(ValueError, match="did not keep the state before update 3"):
        branching.make_branches(world, 0, 3, tmp_path, lambda number: None)


def test_an_evaluation_uses_common_random_numbers(world):
    """The same weights have the same reward, whatever was sampled in between; the NLL is the model's own."""
    with world.adapted(0) as model:
        first = world.held_out_reward(model, seed=3)
        world.held_out_reward(model, seed=4)
        assert world.held_out_reward(model, seed=3) == first
        assert set(first) == set(SLICES)
        ids = [torch.cat(pair) for pair in zip(world.held_out.prompts, world.held_out.responses, strict=True)]
        losses = []
        for row, response in zip(ids, world.held_out.responses, strict=True):
            labels = row.clone()
            labels[: len(row) - len(response)] = -100
            losses.append(model(input_ids=row[None], labels=labels[None]).loss.item())
        assert world.nll(model) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_prompts_are_used_once():
    """No prompt has two uses, every slice has enough, and two slices are never trained on."""
    texts = [text for part in SLICES.values() for use in (part.train, part.control, part.held_out) for text in use]
    assert len(set(texts)) == len(texts)
    train, control, held_out = Study().prompts_per_slice
    for name in TRAINED:
        part = SLICES[name]
        assert len(part.train) >= train
        assert len(part.control) >= control
    assert all(len(part.held_out) >= held_out for part in SLICES.values())
    assert UNSEEN == ("advice", "translate")


def test_a_batch_has_different_slices(world):
    slice_of = {text: name for name, part in SLICES.items() for text in part.train}
    for seed in range(20):
        batch = world.batch(worlds.stream(seed, 0))
        assert len({slice_of[messages[-1]["content"]] for messages in batch}) == TINY.prompts


def test_the_table_is_complete():
    """The paper's eight, the two baselines it lacked, and the primary contrast at nine seeds."""
    assert sorted(c.paper for c in CONDITIONS.values() if c.paper) == list(range(1, 9))
    assert {"target_kl", "adaptive_kl"} <= set(CONDITIONS)
    planned = {(b.arm, condition, seed) for b in PLAN for condition in b.conditions for seed in b.seeds}
    arm, *pair = PRIMARY
    for condition in pair:
        assert sum(run[:2] == (arm, condition) for run in planned) >= 9
    assert {run[0] for run in planned} == set(ARMS)
    assert {run[1] for run in planned} | {branch.condition for branch in BRANCHES.values()} == set(CONDITIONS)
    assert len(planned) == sum(len(b.conditions) * len(b.seeds) for b in PLAN)


def test_two_studies_do_not_share_a_folder(tmp_path):
    taken = pytest.raises(work.TaskFailed, match="another study is at work")
    with work.alone(tmp_path), taken, work.alone(tmp_path):
        pass
    with work.alone(tmp_path):
        pass


def command(folder: Path, *arguments: str) -> list[str]:
    options = ["--smoke", "--runs", str(folder / "runs"), "--out", str(folder / "out"), *arguments]
    return [sys.executable, str(STUDY), *options]


def test_a_killed_study_goes_on_and_a_broken_condition_fails_it(tmp_path):
    """As a user would see it: SIGKILL in the middle, the same command again; then a label without a mechanism."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    only = ("--only", "shocks/", "--jobs", "2")
    planned = {condition for b in PLAN if b.arm == "shocks" for condition in b.conditions}
    with subprocess.Popen(command(tmp_path, *only), env=environment) as process:
        try:
            until = time.monotonic() + 300
            while not list(tmp_path.glob("runs/*/*/*/checkpoint.pt")) and time.monotonic() < until:
                time.sleep(0.05)
        finally:
            process.kill()  # its workers notice by themselves
    assert len(list(tmp_path.glob("runs/*/*/*/run.json"))) < len(planned)

    done = subprocess.run(command(tmp_path, *only), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left" in done.stdout
    assert {path.parent.parent.name for path in tmp_path.glob("runs/shocks/*/0/run.json")} == planned
    assert "Activation" in (tmp_path / "out" / "REPORT.md").read_text()

    fixed = json.loads((tmp_path / "runs/shocks/fixed/0/run.json").read_text())
    gate = {"condition": "gate", "settings": run_settings(SMOKE, "shocks", "gate")}
    (tmp_path / "runs/shocks/gate/0/run.json").write_text(json.dumps(fixed | gate))
    broken = subprocess.run(command(tmp_path, *only), env=environment, capture_output=True, text=True, check=False)
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "IDENTICAL: shocks/fixed and shocks/gate" in broken.stdout
    (tmp_path / "runs/shocks/gate/0/run.json").write_text(json.dumps(fixed | {"settings": "others"}))
    other = subprocess.run(command(tmp_path, *only), env=environment, capture_output=True, text=True, check=False)
    assert "gate/0/run.json is a run of other settings" in other.stderr
    shutil.rmtree(tmp_path / "runs")
