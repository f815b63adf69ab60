"""`make bench` runs to its end on a tiny model, and what it compares with is what it says; no times are asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from step_optim import ControlSet, Movement, TokenKL
from tests import reference
from tests.models import VOCAB, nudge, ragged_control, tiny_llama

ROOT = Path(__file__).parent.parent.parent
BENCH = ROOT / "examples" / "bench"
sys.path.insert(0, str(BENCH))

import measure  # noqa: E402
import naive  # noqa: E402
import today  # noqa: E402
import workload  # noqa: E402
from bench import Bench  # noqa: E402
from graph import audited_tokens  # noqa: E402

CPU = torch.device("cpu")
VERDICTS = ("met", "met (stretch)", "missed")


def run(directory: Path, *arguments: str) -> str:
    """Run the benchmark as a user would."""
    done = subprocess.run(
        [sys.executable, str(BENCH), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_quick_run_measures_everything_and_can_be_rendered_again(tmp_path):
    """All sections, all goals, a picture; every method did what its name says; the raw figures suffice for a report."""
    run(tmp_path, "--quick", "--device", "cpu", "--threads", "1", "--rounds", "1")
    raw, table = (tmp_path / "runs" / "bench" / f"cpu-quick.{suffix}" for suffix in ("json", "md"))
    result = json.loads(raw.read_text())
    assert list(result["sections"]) == ["step", "search", "curves", "numerics", "noise", "graph"]
    assert result["skipped"] == []
    for step in result["sections"]["step"].values():
        check_methods(step["methods"])
    check_searches(result["sections"]["search"])
    assert all(len(points) >= 2 for points in result["sections"]["curves"].values())
    text = table.read_text()
    verdicts = [cell for line in text.splitlines() for cell in line.split(" | ") if cell in VERDICTS]
    assert len(verdicts) == 8
    assert "python examples/bench --quick" in text

    shown = run(tmp_path, "--render", str(raw), "--out", str(tmp_path / "again"))
    assert (tmp_path / "again" / "cpu-quick.md").read_text() == text
    assert (tmp_path / "again" / "cpu-quick.png").read_bytes().startswith(b"\x89PNG")
    assert "again" in shown


def test_what_saves_waits_is_measured_in_turns(tmp_path):
    """A row for each kind of step, with its paired ratio; on a CPU the script only shows that it runs."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples/bench/waits.py"),
            *["--device", "cpu", "--layers", "1", "--width", "32", "--rounds", "2"],
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["committed step", "---", "as it is", "judged early", "one by one"]


def check_methods(methods: dict) -> None:
    """Commits commit, gates reject, interpolation shrinks, and copies of everything take memory."""
    trials = {name: row["trials"]["median"] for name, row in methods.items() if "trials" in row}
    alpha = {name: row["alpha"]["median"] for name, row in methods.items() if "alpha" in row}
    assert trials["naive interpolate"] == 10
    assert trials["STEP commit"] == trials["STEP gate"] == trials["naive commit"] == 0
    assert alpha["STEP commit"] == 1
    assert alpha["STEP gate"] == 0
    assert all(0 < alpha[name] < 1 for name in ("STEP interpolate", "STEP strict", "STEP bisect", "STEP backtrack"))
    assert methods["naive commit"]["peak_step"] > methods["STEP commit"]["peak_step"] > 0
    assert all(seconds > 0 for row in methods.values() for seconds in row["raw"])


def check_searches(search: dict) -> None:
    """Every search had the same problems; those that promise 1 % keep it."""
    totals = search["searches"]
    assert {len(problem["found"]) for problem in search["problems"]} == {len(totals)}
    assert totals["bisect"]["within"] == totals["model, strict"]["within"] == 1
    assert totals[search["default"]]["mean"] < totals["bisect"]["mean"]


def test_an_interrupted_run_goes_on(tmp_path):
    """--resume keeps the sections that are there, and measures the others."""
    raw = tmp_path / "runs" / "bench" / "cpu-quick.json"
    raw.parent.mkdir(parents=True)
    points = [{"kl": kl, "step_optim": 0.0, "textbook": 0.5} for kl in (0.0, 42.0)]
    raw.write_text(json.dumps({"sections": {"numerics": points}, "skipped": ["curves: no time"]}))
    run(tmp_path, "--quick", "--device", "cpu", "--threads", "1", "--only", "numerics,graph", "--resume")
    result = json.loads(raw.read_text())
    assert result["sections"]["numerics"] == points
    assert result["sections"]["graph"]["roofline"]["share"] > 0
    assert "- curves: no time" in raw.with_suffix(".md").read_text()


def two_policies():
    """A model, the same one after a nudge, and a control set."""
    before, after = tiny_llama(), tiny_llama()
    nudge(after, 0.1)
    return before, after, ragged_control()


def exact(candidate, previous, control) -> Movement:
    """The float64 oracle."""
    return reference.movement(
        reference.policy_of(candidate, control), reference.policy_of(previous, control), control.slices
    )


def test_the_naive_audit_measures_the_papers_movement():
    """One padded batch and the textbook sum agree with the oracle, slices too."""
    before, after, control = two_policies()
    batch = naive.Padded.of(control)
    found = naive.movement(batch.log_probs(after), batch.log_probs(before), batch, control)
    expected = exact(after, before, control)
    assert expected.mean > 1e-3
    assert found.mean == pytest.approx(expected.mean, rel=1e-3)
    assert found.slices == pytest.approx(dict(expected.slices), rel=1e-3)


def proposing(kind=naive.NaiveSTEP, **options):
    """Algorithm 1 before a step that moves far; the model, the optimizer's wrapper, and a copy of the model."""
    model, control = tiny_llama(), ragged_control()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.cat([control.prompts[0], control.responses[0]])[None]
    model(input_ids=text, labels=text).loss.backward()
    return model, kind(model, optimizer, control, slices=float("inf"), **options), tiny_llama()


def test_naive_bisection_finds_the_largest_alpha_that_fits():
    """What is committed is within the budget, and the next larger of the 1024 parts is not."""
    model, algorithm, before = proposing(mean=0.01)
    alpha = algorithm.step()
    assert 0 < alpha < 1
    assert algorithm.audits == 10
    committed = exact(model, before, algorithm.control)
    assert 0.009 < committed.mean <= 0.01 * (1 + 1e-4)


def test_naive_commits_and_rejects():
    """A roomy budget leaves the bare step; a gate leaves no trace of it."""
    bare, algorithm, _ = proposing(mean=1e9)
    algorithm.optimizer.step()
    committed, algorithm, _ = proposing(mean=1e9)
    assert algorithm.step() == 1
    assert all(map(torch.equal, committed.parameters(), bare.parameters()))

    rejected, algorithm, before = proposing(mean=1e-9, controller="hard gate")
    assert algorithm.step() == 0
    assert all(map(torch.equal, rejected.parameters(), before.parameters()))
    assert not algorithm.optimizer.state


def test_the_line_search_backtracks_by_a_fifth():
    """TRPO's: the first of 0.8, 0.64, ... within the budget."""
    model, search, before = proposing(today.LineSearch, mean=0.01)
    alpha = search.step()
    assert alpha == pytest.approx(0.8**search.audits)
    assert exact(model, before, search.control).mean <= 0.01 * (1 + 1e-4)


def test_todays_penalty_and_early_stop():
    """Next to its reference the penalty is nothing, away from it something; a long step stops the epoch."""
    model = tiny_llama()
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    penalty = today.KLPenalty(model, ids, beta=1.0)

    def plain() -> float:
        return model(input_ids=ids, labels=ids).loss.item()

    assert penalty.loss().item() == pytest.approx(plain(), rel=1e-5)
    nudge(model, 0.05)
    assert penalty.loss().item() > plain()

    stops = []
    for lr in (1e-9, 1e-1):
        model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        watch = today.TargetKL(model, optimizer, ids, target=0.01)
        model(input_ids=ids, labels=ids).loss.backward()
        stops.append(watch.step())
    assert stops == [False, True]


def test_peak_memory_of_a_known_allocation():
    """What was there before does not count, what is freed on the way does, and what stays is told."""
    megabyte = 1 << 20
    before = torch.zeros(8 * megabyte, dtype=torch.uint8)
    kept = []

    def work() -> None:
        scratch = torch.empty(3 * megabyte, dtype=torch.uint8)
        copy = scratch.clone()
        del scratch
        kept.append(copy[:1].clone())
        kept.append(torch.empty(megabyte, dtype=torch.uint8))

    peak, held = measure.allocated(work, CPU)
    assert peak == pytest.approx(6 * megabyte, rel=0.01)
    assert held == pytest.approx(megabyte, rel=0.01)
    assert measure.peak_bytes(before.max, CPU) < megabyte


def test_methods_take_turns():
    """Each once a round, prepared before, in an order that rotates."""
    seen = []
    methods = [
        measure.Method(name, lambda name=name: seen.append(name), prepare=lambda: seen.append("prepare"))
        for name in "abc"
    ]
    found = measure.interleaved(methods, 3, CPU)
    assert seen[::2] == ["prepare"] * 9
    rounds = ["".join(seen[1::2][i : i + 3]) for i in (0, 3, 6)]
    assert rounds == ["abc", "bca", "cab"]
    assert [len(timings.seconds) for timings in found.values()] == [3, 3, 3]


@pytest.fixture(scope="module")
def tiny_bench() -> Bench:
    """A run of the tiny model, at the step that is measured."""
    made = workload.quick_workload(CPU, torch.float32)
    bench = Bench(made.model("lora"), made.batch(), made.control())
    bench.calibrate()
    return bench


def test_every_method_makes_as_many_forwards_as_it_should(tiny_bench):
    """The committed step of STEP costs one audit and nothing else; today's methods one forward more than the bare."""
    forwards = {}
    for method in tiny_bench.methods():
        method.prepare()
        calls: list[int] = []
        with_hook = tiny_bench.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        method.run()
        with_hook.remove()
        forwards[method.name] = len(calls)
    assert forwards["bare"] == forwards["forward"] == 1
    tiny_bench.anchor()
    audit = len(audited_tokens(tiny_bench))
    assert forwards["STEP commit"] == forwards["STEP gate"] == 1 + audit
    assert forwards["KL penalty"] == forwards["target KL"] == 2


def test_a_method_starts_where_the_others_did(tiny_bench):
    """Weights and optimizer state are put back to the bit, whatever a method did to them."""
    tiny_bench.start.put_back()
    before = [p.detach().clone() for p in tiny_bench.model.parameters()]
    for method in tiny_bench.methods():
        method.prepare()
        method.run()
    tiny_bench.start.put_back()
    assert all(map(torch.equal, before, tiny_bench.model.parameters()))
    assert {float(state["step"]) for state in tiny_bench.inner.state.values()} == {3.0}


def test_control_sets_are_as_described():
    """Four slices, one prefix, responses of 16 to 32 tokens; the same ids for the same seed."""
    made = workload.quick_workload(CPU, torch.float32)
    control = made.control(24)
    assert len(control) == 24
    assert {len(members) for members in control.slices.values()} == {6}
    assert {16 <= len(response) <= 32 for response in control.responses} == {True}
    assert len({tuple(prompt[: workload.PREFIX].tolist()) for prompt in control.prompts}) == 1
    assert control.digest == made.control(24).digest != made.control(24, seed=1).digest


def test_gradients_of_constraints_hold_one_micro_batch() -> None:
    """Their memory does not grow with the prompts, and is below that of one training step on as many tokens."""
    model = tiny_llama(layers=3, hidden=32)

    def prompts(count: int, seed: int) -> ControlSet:
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randint(1, VOCAB, (10,), generator=generator) for _ in range(2 * count)]
        return ControlSet.from_ids(draws[::2], draws[1::2])

    def peak(count: int) -> int:
        kl = TokenKL(model, prompts(count, 0), pool=prompts(count, 1), noise_floor=False, micro_batch=2)
        kl.anchor()
        parameters = list(model.parameters())
        kl.gradients(["drift"], parameters, kl.draw(count, 0, ["drift"]))
        draw = kl.draw(count, 1, ["drift"])
        return measure.peak_bytes(lambda: kl.gradients(["drift"], parameters, draw), CPU)

    ids = torch.cat(
        [torch.cat([a, b])[None] for a, b in zip(prompts(32, 1).prompts, prompts(32, 1).responses, strict=True)]
    )
    step = measure.peak_bytes(lambda: model(input_ids=ids, labels=ids).loss.backward(), CPU)
    few, many = peak(4), peak(32)
    assert many <= 1.3 * few
    assert many <= 0.5 * step
