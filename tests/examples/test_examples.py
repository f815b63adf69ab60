"""The examples and the guides run, on tiny budgets, as a user would run them; and the package is packaged."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

import step_optim
from step_optim import Action, read_log
from tests.hosts.text import forget_accelerator

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
PAGES = [README, *GUIDES]


def run(*arguments: str, directory: Path, path: Path | None = None) -> str:
    """Run an example in a directory of its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", *arguments],
        cwd=directory,
        env=os.environ | ({} if path is None else {"PYTHONPATH": str(path)}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


QUICKSTART = ROOT / "examples" / "quickstart.py"


def test_the_quickstart_is_short_and_runs(tmp_path):
    """In less than 40 lines, on a tiny model in the place of the real one."""
    assert len(QUICKSTART.read_text().splitlines()) < 40
    stand_in = "import runpy, smollm, sys, tiny; smollm.find, smollm.load = str, lambda name: tiny.load(); "
    shown = run("-c", f"{stand_in} runpy.run_path({str(QUICKSTART)!r})", directory=tmp_path, path=QUICKSTART.parent)
    assert shown.count("KL ") == 8
    assert "generalisation_drift" in shown


@pytest.mark.slow
@pytest.mark.model
def test_the_quickstart_shows_a_controller_acting(tmp_path):
    """On the real model it commits ordinary steps, and shrinks the spike."""
    shown = run(str(QUICKSTART), directory=tmp_path)
    assert "commit" in shown
    assert "shrink" in shown


def test_the_figures_of_control_sets_are_made(tmp_path):
    """How the estimate settles, and how far budgets carry, with a tiny random model."""
    shown = run(str(ROOT / "examples" / "choosing.py"), "--smoke", "--runs", str(tmp_path / "a"), directory=tmp_path)
    assert "| 8 |" in shown
    assert (tmp_path / "a" / "choosing.png").read_bytes().startswith(b"\x89PNG")
    shown = run(
        str(ROOT / "examples" / "control_sizes.py"), "--smoke", "--runs", str(tmp_path / "b"), directory=tmp_path
    )
    assert "| shrink | 4 | none |" in shown
    assert "| steer | 8 | 0.95 |" in shown


@pytest.mark.parametrize(("controller", "action"), [("interpolate", "shrink"), ("gate", "reject")])
def test_the_demo_runs_on_a_tiny_model(tmp_path, controller, action):
    """Traces of both runs, a picture, a table and the sentence; the shock is controlled in one run only."""
    shown = run(
        str(ROOT / "examples" / "demo"),
        *("--tiny", "--updates", "3", "--shock-at", "2", "--out", str(tmp_path / "out"), "--controller", controller),
        directory=tmp_path,
    )
    records = {path.name: read_log(path) for path in (tmp_path / "out").glob("*.jsonl")}
    assert sorted(map(len, records.values())) == [3, 3]
    controlled = {name: [str(r.action) for r in run_records if r.triggered] for name, run_records in records.items()}
    assert controlled == {"step.jsonl": [action], "without.jsonl": []}
    picture = tmp_path / "out" / "demo.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in shown.replace("\n", "")


def test_the_demo_says_what_to_do_without_a_model(tmp_path):
    """A directory that holds no model ends with exit code 2 and one clear message."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo"), "--model", str(tmp_path), "--out", str(tmp_path / "o")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("controller", ["interpolate", "gate", "none"])
def test_custom_rl_holds_its_budget(tmp_path, controller):
    """PPO on CartPole for two updates: every accepted movement is within the budget, unless there is none."""
    log = tmp_path / "run.jsonl"
    run(
        str(ROOT / "examples" / "custom_rl.py"),
        *("--total-steps", "4096", "--budget-mean", "1e-3", "--controller", controller, "--log", str(log)),
        directory=tmp_path,
    )
    records = read_log(log)
    assert records
    if controller == "none":
        assert all(record.action is Action.COMMIT for record in records)
    else:
        assert any(record.triggered for record in records)
        assert all(record.accepted.mean <= 1e-3 for record in records)


def test_grpo_of_trl_gets_a_trust_region_in_one_line(tmp_path):
    """With TRL's defaults bare steps leave the budget while its clipping never acts; with STEP they keep to it."""
    trl = pytest.importorskip("trl")
    defaults = {field.name: field.default for field in dataclasses.fields(trl.GRPOConfig)}
    assert (defaults["beta"], defaults["num_iterations"]) == (0.0, 1)
    source = ROOT / "examples" / "trl_grpo.py"
    marked = source.read_text().split("# ----")[1].splitlines()[1:]
    assert sum(bool(line.strip()) for line in marked) == 1

    shown = run(str(source), "--steps", "3", "--log", str(tmp_path / "logs"), directory=tmp_path)
    bare, held = (read_log(tmp_path / "logs" / f"{name}.jsonl") for name in ("bare", "step"))
    assert len(bare) == len(held) == 3
    assert {record.action for record in bare} == {Action.COMMIT}
    assert max(record.accepted.mean for record in bare) > 0.01
    assert all(record.accepted.mean <= 0.01 for record in held)
    assert Action.SHRINK in {record.action for record in held}
    assert shown.count("clipping acted on 0%") == 2
    assert f"bare {max(record.accepted.mean for record in bare):.5f}, budget 0.01000" in shown


def test_by_layer_compares_both_ways_on_the_same_responses(tmp_path):
    """A line for all candidates; both ways are within the budget."""
    shown = run(
        str(ROOT / "examples" / "by_layer.py"), "--smoke", "--out", str(tmp_path / "table.md"), directory=tmp_path
    )
    header, _, *rows = [line.strip("| ").split(" | ") for line in shown.splitlines() if line.startswith("|")]
    assert header[:4] == ["setting", "candidates", "objective, straight", "by layer"]
    assert rows[-1][0] == "all"
    assert int(rows[-1][1]) == sum(line[:1].isdigit() for line in shown.splitlines()) > 0
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize("options", [(), ("--fsdp",)])
def test_ddp_takes_one_decision_on_two_processes(tmp_path, options):
    """The spike is shrunk, and both processes hold the same bits at the end; short enough to copy."""
    source = ROOT / "examples" / "ddp.py"
    assert len(source.read_text().splitlines()) <= 120
    shown = run(str(source), "--ranks", "2", *options, directory=tmp_path)
    actions = [line.split()[9] for line in shown.splitlines() if line.startswith("step")]
    assert len(actions) == 8
    assert actions[5] == "shrink"
    assert "commit" in actions
    assert "2 processes hold the same bits" in shown


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of a page in one language: the number of the line before each, and its text."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, block.start(1)), block[1]


def execute(page: Path, line: int, source: str, namespace: dict[str, Any]) -> None:
    """Run a block, so that an error names its line on the page."""
    exec(compile("\n" * line + source, str(page), "exec", dont_inherit=True), namespace)


@pytest.fixture
def as_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, where the modules of `examples` can be imported; what is global is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    forget_accelerator()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    forget_accelerator()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Trainers say this of tiny runs, of the number of cores, and of options that transformers has renamed.
@pytest.mark.filterwarnings("ignore:The '?.*'? does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("as_a_script")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_on_every_page_runs(page):
    """The python blocks of a page run in order, in one namespace, without a warning."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for line, source in blocks(page, "python"):
        execute(page, line, source, namespace)


@pytest.mark.usefixtures("as_a_script")
def test_the_three_lines_of_the_readme_run():
    """The README's diff: what stands after it is a training step that is audited and logged."""
    import tiny

    model, tokenizer = tiny.load()
    ids = tokenizer("It is 5.", return_tensors="pt")["input_ids"]
    namespace = vars(step_optim) | {"torch": torch, "model": model, "tokenizer": tokenizer}
    namespace |= {"loss": model(input_ids=ids, labels=ids).loss}
    ((line, diff),) = blocks(README, "diff")
    marked = [row for row in diff.splitlines() if row.startswith("+")]
    assert len(marked) == 3
    execute(README, line, "\n".join("" if row.startswith("-") else row[2:] for row in diff.splitlines()), namespace)
    (record,) = read_log("run.jsonl")
    assert record.accepted.mean <= 0.03
    assert len(record.accepted.slices) == 8


def test_the_record_in_the_readme_is_one():
    """It is JSON of a record's fields, and its decision follows from its figures."""
    ((_, text),) = blocks(README, "json")
    record = json.loads(text)
    assert record.keys() <= {field.name for field in dataclasses.fields(step_optim.StepRecord)}
    assert record["triggered"]
    assert record["bound"] == "mean"
    assert record["candidate"]["mean"] > record["budget"]["mean"] >= record["accepted"]["mean"]
    assert record["candidate"]["slices"]["fact"] > record["budget"]["slices"]["fact"]


def test_the_readme_is_short_and_leads_to_every_guide():
    """At most 130 lines; each guide is linked from it."""
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert GUIDES
    assert [guide.name for guide in GUIDES if f"(examples/guides/{guide.name})" not in text] == []


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub writes them in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_somewhere(page):
    """Relative links point at files that exist, and at headings that they have; so do test files that are named."""
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    assert [name for name in re.findall(r"\btests/\w+\.py\b", text) if not (ROOT / name).exists()] == []


def test_the_package_is_typed_and_imports_no_integration():
    """py.typed is there; importing step_optim loads torch, but neither transformers nor bitsandbytes nor peft."""
    assert (importlib.resources.files("step_optim") / "py.typed").is_file()
    code = "import step_optim, sys; print([m for m in ('transformers', 'peft', 'bitsandbytes') if m in sys.modules])"
    assert run("-c", code, directory=ROOT).strip() == "[]"


def test_all_public_names_exist_and_are_documented():
    """Everything in __all__ can be imported and has a docstring."""
    for name in step_optim.__all__:
        assert getattr(step_optim, name).__doc__, name
