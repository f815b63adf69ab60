"""examples/steering: it runs, goes on where it stopped, and its sets have no prompt in common."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as its own script does

import tiny  # noqa: E402
from steering.arms import CAP  # noqa: E402
from steering.counting import Counting  # noqa: E402
from steering.prompts import ELSEWHERE, PROMPTS  # noqa: E402
from steering.run import Setting, run  # noqa: E402
from steering.tasks import TASKS, examples  # noqa: E402
from steering.world import prompt_sets, task_data  # noqa: E402


def test_the_smoke_run_and_again(tmp_path) -> None:
    """A table, a picture, a file for every run; what is done is not done again."""
    command = [sys.executable, str(EXAMPLES / "steering"), "--smoke", "--runs", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "smoke"
    assert (folder / "smoke.png").stat().st_size > 10_000
    table = (folder / "smoke.md").read_text()
    assert "cap, Steer with a pool" in table
    results = {path.stem.split("-")[1]: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert results["steer"]["largest"] <= CAP < results["bare"]["largest"]
    assert results["steer"]["at_cap"] > 0 == results["steer"]["rejected"]
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert table.splitlines()[-1] in again.stdout


def test_the_sets_have_no_prompt_in_common() -> None:
    """Those that judge, those that directions come from, those held out, and the task's."""
    model, tokenizer = tiny.load()
    sets = prompt_sets(model, tokenizer)
    found = [{tuple(ids.tolist()) for ids in part.prompts} for part in (sets.control, sets.pool, sets.held_out)]
    assert [len(part) for part in found] == [12, 36, 16]
    assert len(set.union(*found)) == sum(map(len, found))
    assert set(sets.control.slices) == set(sets.pool.slices) == set(PROMPTS)
    assert set(sets.held_out.slices) == {*PROMPTS, *ELSEWHERE}


def test_a_model_that_counts_forgets_unless_it_is_steered(tmp_path) -> None:
    """The smallest form of the table: the same task, a twentieth of the drift, no step rejected."""
    world = Counting()
    bare, steered, shrunk = (
        run(Setting("counting", arm, 3e-3, 0, 60), world, tmp_path) for arm in ("bare", "steer", "shrink")
    )
    assert bare.held_out > 20 * CAP
    assert steered.largest <= CAP
    assert steered.held_out < 3 * CAP
    assert steered.rejected == 0 < steered.at_cap
    assert steered.nll < 2 * bare.nll + 0.05
    assert shrunk.nll > 10 * steered.nll


@pytest.mark.parametrize("task", TASKS)
def test_tests_are_not_trained_on(task) -> None:
    """And they are the same for every seed."""
    _, tokenizer = tiny.load()
    train, test = task_data(tokenizer, task, 0)
    other, same = task_data(tokenizer, task, 1)
    prompts = {tuple(pair.prompt.tolist()) for pair in test}
    assert prompts == {tuple(pair.prompt.tolist()) for pair in same}
    assert not any(tuple(pair.prompt.tolist()) in prompts for pair in [*train, *other])
    assert len(train) == len(other) == 256


def test_answers_are_in_the_convention() -> None:
    """One line of JSON, cities in capitals; a quantity between bars."""
    for example in examples("person", 20, 0):
        record = json.loads(example.response)
        assert set(record) == {"nm", "ag", "ct", "jb"}
        assert record["ct"].isupper()
        assert record["jb"] in example.prompt
        assert str(record["ag"]) in example.prompt
    rng = random.Random(0)
    for _ in range(20):
        assert TASKS["units"](rng).response.count("|") == 3
