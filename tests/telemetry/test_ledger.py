"""The ledger's file, its figures, and what its ratios say."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Ledger, PolicyKL, STEPOptimizer
from step_optim.__main__ import main
from step_optim.telemetry import Stage

kls = st.floats(0, 10)
by_slice = st.dictionaries(st.sampled_from(["math", "code", "a:b"]), kls, max_size=3)
stages = st.lists(
    st.builds(
        Stage,
        stage=st.text(min_size=1, max_size=5),
        steps=st.integers(0, 100),
        path=kls,
        path_slices=by_slice,
        displacement=st.none() | kls | st.just(math.inf),
        displacement_slices=by_slice,
        origin=st.sampled_from(["first", "own"]),
    ),
    max_size=4,
    unique_by=lambda stage: stage.stage,
)


@given(stages=stages)
def test_what_was_written_is_read(stages) -> None:
    """To the bit, stage after stage; and totals are sums."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "ledger.json"
        for i, stage in enumerate(stages):
            ledger = Ledger(path, stage=stage.stage)
            assert ledger.before.mean == sum(each.path for each in stages[:i])
            ledger.write(Stage(stage.stage, steps=1))
            ledger.write(stage)
        ledger = Ledger(path)
        assert list(ledger.stages) == stages
        figures = ledger.figures()
        json.dumps(figures)
        assert figures["path"] == sum(stage.path for stage in stages)
        for name in figures["path_slices"]:
            assert figures["path_slices"][name] == sum(stage.path_slices.get(name, 0.0) for stage in stages)
        total = 0.0
        for stage, entry in zip(stages, figures["stages"], strict=True):
            total += stage.path
            path_so_far = stage.path if stage.origin == "own" else total
            known = stage.displacement is not None and path_so_far > 0
            assert entry["ratio"] == (stage.displacement / path_so_far if known else None)
        assert str(ledger).count("\n") >= len(stages)


def ratio(folder, directions) -> float:
    """Displacement / path of a Gaussian policy whose mean makes equal steps in some directions."""
    mean = torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
    kl = PolicyKL(lambda: torch.distributions.Normal(mean[None], 1.0), noise_floor=False)
    ledger = Ledger(Path(folder) / "ledger.json", stage="one")
    optimizer = STEPOptimizer(torch.optim.SGD([mean], lr=1.0), kl=kl, budget=1.0, ledger=ledger)
    for direction in directions:
        mean.grad = torch.zeros_like(mean)
        mean.grad[abs(direction) - 1] = math.copysign(0.1, direction)
        optimizer.step()
    return ledger.figures()["ratio"]


def test_the_ratio_tells_straight_paths_from_crooked_ones(tmp_path) -> None:
    """KL is quadratic here: n for n equal steps, 1 for steps at right angles, 0 for those that undo each other."""
    assert ratio(tmp_path / "straight", [1] * 8) == pytest.approx(8)
    assert ratio(tmp_path / "crooked", range(1, 9)) == pytest.approx(1)
    assert ratio(tmp_path / "back", [1, -1] * 4) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"step_optim": 1}', '{"step_optim_ledger": 1}', '{"step_optim_ledger": 1, "stages": [{}]}'],
)
def test_another_file_is_refused(tmp_path, text) -> None:
    """And left as it is."""
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"file\.json cannot be read as a ledger .* choose another path"):
        Ledger(path, stage="sft")
    assert path.read_text() == text


def test_a_newer_ledger_is_refused(tmp_path) -> None:
    path = tmp_path / "ledger.json"
    path.write_text('{"step_optim_ledger": 2, "stages": []}')
    with pytest.raises(ValueError, match="schema 2, this version reads up to 1; upgrade"):
        Ledger(path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stage": ""}, TypeError, "stage='' is no name"),
        ({"stage": 3}, TypeError, "stage=3 is no name; give a text"),
        ({"stage": "sft", "origin": "last"}, ValueError, "origin='last' is unknown; use 'first' or 'own'"),
        ({"path": ""}, ValueError, "path='' is no file"),
        ({"path": 3}, ValueError, "path=3 is no file"),
        ({"path": "."}, ValueError, "path='.' is no file"),
        ({"path": "/proc/no/ledger.json", "stage": "sft"}, ValueError, "nothing can be written there"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        Ledger(**{"path": tmp_path / "ledger.json"} | arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", -5.0),
        ("path", "NaN"),
        ("path", "Infinity"),
        ("path_slices", {"math": -1.0}),
        ("displacement", "NaN"),
        ("steps", -3),
        ("steps", 1.5),
        ("steps", True),
        ("origin", "foo"),
        ("stage", ""),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, name, value) -> None:
    """A cap would count with it."""
    path = tmp_path / "ledger.json"
    Ledger(path, stage="sft").write(Stage("sft", 2, 0.25, {"math": 0.5}, 0.5))
    plain = json.loads(path.read_text())
    plain["stages"][0][name] = value
    path.write_text(json.dumps(plain))
    with pytest.raises(
        ValueError, match=rf"ledger\.json cannot be read as a ledger \(ValueError: {name}.* in the entry "
    ):
        Ledger(path, stage="dpo")


def test_what_an_entry_lacks_is_named(tmp_path) -> None:
    """And the entry, of several."""
    path = tmp_path / "ledger.json"
    for name in ("sft", "dpo"):
        Ledger(path, stage=name).write(Stage(name, 2, 0.25))
    plain = json.loads(path.read_text())
    del plain["stages"][1]["path"]
    path.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"'path' is missing in the entry \{'stage': 'dpo'"):
        Ledger(path)


def test_two_entries_of_one_stage_are_refused(tmp_path) -> None:
    """Nobody knows which one counts."""
    path = tmp_path / "ledger.json"
    Ledger(path, stage="sft").write(Stage("sft", 2, 0.25))
    plain = json.loads(path.read_text())
    plain["stages"] *= 2
    path.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="two of its stages have one name"):
        Ledger(path)


def test_only_its_own_policies_are_forgotten(tmp_path) -> None:
    """Also beside a name that means something to a shell."""
    for stem in ("ledger", "run[1]"):
        ledger = Ledger(tmp_path / f"{stem}.json", stage="sft")
        ledger.write(Stage("sft", 2, 0.25))
        mine = [tmp_path / f"{stem}.pi_ref{rank}.pt" for rank in ("", ".1")]
        others = [tmp_path / f"{stem}.pi_ref_of_mine.pt", tmp_path / "run1.pi_ref.pt"]
        for file in (*mine, *others):
            file.touch()
        ledger.forget("sft")
        assert not any(file.exists() for file in mine)
        assert all(file.exists() for file in others)


def test_a_ledger_that_was_forgotten_is_another_one(tmp_path) -> None:
    """So that a pi_ref which a kill leaves behind is not taken for its own."""
    path = tmp_path / "ledger.json"
    for name in ("sft", "dpo"):
        Ledger(path, stage=name).write(Stage(name, 2, 0.25))
    before = Ledger(path).id
    Ledger(path).forget("dpo")
    assert Ledger(path).id == before
    Ledger(path).forget("sft")
    assert Ledger(path).id != before


def test_a_ledger_stays_where_it_is(tmp_path, monkeypatch) -> None:
    """Though the process goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    ledger = Ledger("ledger.json", stage="sft")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ledger.write(Stage("sft", 2, 0.25))
    assert (tmp_path / "ledger.json").exists()


def test_a_stage_that_others_came_after_is_over(tmp_path) -> None:
    """Unless those are forgotten; with the first stage goes its policy."""
    path = tmp_path / "ledger.json"
    for name in ("sft", "dpo", "grpo"):
        Ledger(path, stage=name).write(Stage(name, steps=2, path=0.25))
    (tmp_path / "ledger.pi_ref.pt").touch()
    with pytest.raises(ValueError, match=r"stage='sft' ended when 'dpo' began .*forget\('dpo'\)"):
        Ledger(path, stage="sft")
    with pytest.raises(ValueError, match="stage='ppo' is not in"):
        Ledger(path).forget("ppo")
    Ledger(path).forget("dpo")
    again = Ledger(path, stage="sft")
    assert (len(again.stages), again.before.mean) == (1, 0.0)
    assert (tmp_path / "ledger.pi_ref.pt").exists()
    Ledger(path).forget("sft")
    assert Ledger(path).stages == ()
    assert not (tmp_path / "ledger.pi_ref.pt").exists()


def test_the_command_line_shows_it(tmp_path, capsys) -> None:
    """As a table, or as JSON."""
    path = tmp_path / "ledger.json"
    Ledger(path, stage="sft").write(Stage("sft", 2, 0.25, {"math": 0.5}, 0.5, {"math": 0.5}))
    Ledger(path, stage="dpo").write(Stage("dpo", 3, 0.25, {"math": 0.5}, math.inf, {"math": 0.5}))
    assert main(["ledger", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["sft", "2", "all", "0.25", "0.25", "0.5", "2"]
    assert lines[4].split() == ["math", "0.5", "1", "0.5", "0.5"]
    assert main(["ledger", str(path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["path"], figures["displacement"], figures["stages"][0]["ratio"]) == (0.5, "Infinity", 2.0)
    assert main(["ledger", str(tmp_path / "none.json")]) == 2
    assert "there is no ledger" in capsys.readouterr().err
