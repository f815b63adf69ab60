"""The loops of classic reinforcement learning run in seconds and hold their budgets; five lines are STEP's."""

from __future__ import annotations

import json
import re

import pytest

from tests.examples.test_examples import ROOT, run

FOLDER = ROOT / "examples" / "classic_rl"
LOOPS = {
    "cleanrl_ppo.py": ("--total-steps", "2048", "--learning-rate", "1e-2", "--num-steps", "64"),
    "rsl_rl_ppo.py": ("--iterations", "8", "--envs", "64", "--learning-rate", "2e-2"),
}


def movements(shown: str) -> list[tuple[str, float, float]]:
    """What each line says: the action, and the KL of the candidate and of what stands."""
    found = re.findall(r"(\w+)  KL (\S+) -> (\S+)$", shown, flags=re.MULTILINE)
    return [(action, float(candidate), float(accepted)) for action, candidate, accepted in found]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_holds_its_budget(tmp_path, name):
    """Every update stands within it, and some asked for more; without a limit all of them stand as they are."""
    held = movements(run(str(FOLDER / name), *LOOPS[name], "--budget", "0.002", directory=tmp_path))
    assert len(held) == 8
    assert {action for action, _, _ in held} >= {"shrink"}
    assert max(accepted for _, _, accepted in held) <= 0.002
    bare = movements(run(str(FOLDER / name), *LOOPS[name], "--budget", "inf", directory=tmp_path))
    assert {action for action, _, _ in bare} == {"commit"}
    assert all(candidate == accepted for _, candidate, accepted in bare)
    assert bare[0][1] == held[0][1]


def test_box_actions_run_too(tmp_path):
    """Pendulum, for two updates."""
    options = ("--env-id", "Pendulum-v1", "--total-steps", "1024", "--budget", "0.002")
    shown = run(str(FOLDER / "cleanrl_ppo.py"), *options, directory=tmp_path)
    assert max(accepted for _, _, accepted in movements(shown)) <= 0.002


@pytest.mark.parametrize("name", LOOPS)
def test_five_lines_are_added(name):
    """They are marked, and the guide's diff has each of those of the one-file loop."""
    marked = re.findall(r"^ *(.*?)  # STEP$", (FOLDER / name).read_text(), flags=re.MULTILINE)
    assert len(marked) == 5
    guide = (ROOT / "examples" / "guides" / "classic_rl.md").read_text()
    added = {line[1:].strip() for line in guide.splitlines() if line.startswith("+ ")}
    if name == "cleanrl_ppo.py":
        assert set(marked) <= added
    else:
        assert {line for line in marked if "observe" in line or "window" in line} <= added


@pytest.mark.slow
def test_the_benchmark_runs_and_goes_on_where_it_stopped(tmp_path):
    """Every method makes its updates; those of a trust region stay in it, as an observer of all observations sees."""
    source, folder = str(ROOT / "examples" / "classic_rl"), tmp_path / "runs"
    shown = run(source, "--smoke", "--runs", str(folder), directory=tmp_path)
    results = {file.stem: json.loads(file.read_text()) for file in (folder / "smoke").glob("*.json")}
    assert len(results) == 7
    for name, result in results.items():
        assert len(result["kls"]) == len(result["returns"]) == 2
        if "ppo" not in name and "target_kl" not in name:
            assert max(result["kls"]) < 0.04  # twice the budget, which holds on a draw of the observations
    assert shown.count("| cartpole |") == 7
    again = run(source, "--smoke", "--runs", str(folder), directory=tmp_path)
    assert "1/7" not in again
    assert again.count("| cartpole |") == 7
    assert (folder / "smoke" / "returns.png").stat().st_size > 10_000
