"""Several processes, one policy: the same decision on the same bits everywhere, and nobody hangs."""

from __future__ import annotations

import math
import time

import pytest
import torch
import torch.distributed as dist

from step_optim import Budget, read_log
from tests import rank_jobs as jobs
from tests.ranks import Hang, Workers, on_ranks

KINDS = ["ddp", "fsdp"]


def same(values):
    """The one value that all ranks have."""
    assert all(value == values[0] for value in values), values
    return values[0]


def decisions(result):
    """What was decided, without what depends on how a sum over shards is rounded."""
    return [record | {"update_norm": None, "alpha_realised": None} for record in result["records"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", [True, False])
def test_an_infinite_budget_changes_nothing(kind, shard):
    """Weights and optimizer state of a wrapped run are those of the bare one, on each rank's own data."""
    bare = on_ranks(jobs.train, 2, kind=kind, own=True)
    wrapped = on_ranks(jobs.train, 2, kind=kind, own=True, budget=math.inf, shard=shard)
    for a, b in zip(bare, wrapped, strict=True):
        assert (a["weights"], a["state"]) == (b["weights"], b["state"])
        assert [record["action"] for record in b["records"]] == ["commit"] * 6
    same([result["records"] for result in wrapped])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("controller", ["Gate", "Interpolate"])
def test_every_rank_takes_the_same_decision_and_ends_in_the_same_bits(kind, controller):
    """Rejected, shrunk and committed steps: one story, replicas identical, rejections exact on all ranks."""
    results = on_ranks(jobs.train, 2, kind=kind, own=True, budget=4e-3, controller=controller, shard=True)
    records = same([result["records"] for result in results])
    same([result["weights"] for result in results])
    actions = {record["action"] for record in records}
    assert ("reject" if controller == "Gate" else "shrink") in actions
    assert all(record["accepted"]["mean"] <= 4e-3 for record in records)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_more_ranks_equal_one_to_the_bit(kind, size):
    """On the same data every rank has the same gradient, and its mean is exact: so is everything after it."""
    alone = on_ranks(jobs.train, 1, kind="plain", budget=4e-3)[0]
    assert {record["action"] for record in alone["records"]} >= {"shrink"}
    for result in on_ranks(jobs.train, size, kind=kind, budget=4e-3, shard=False):
        assert decisions(result) == decisions(alone)
        assert result["weights"] == alone["weights"]
        for a, b in zip(result["records"], alone["records"], strict=True):
            assert a["update_norm"] == pytest.approx(b["update_norm"], rel=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_a_sharded_control_set_measures_what_one_process_measures(size):
    """All prompts, every slice, drift: to 1e-6, since a matrix product rounds as the number of its rows has it."""
    ((_, alone),) = on_ranks(jobs.movement, 1, kind="plain", shard=True)
    for kind in KINDS:
        results = on_ranks(jobs.movement, size, kind=kind, shard=True)
        assert same(results)[0]
        for name in ("candidate", "accepted", "reference_drift"):
            found, expected = results[0][1][name], alone[name]
            assert found["mean"] == pytest.approx(expected["mean"], rel=1e-6)
            assert found["slices"] == pytest.approx(expected["slices"], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_control_set_decides_as_one_process_does(kind):
    """Four ranks, a quarter of the prompts each: the actions of one process, and its alphas to 1e-4."""
    alone = on_ranks(jobs.train, 1, kind="plain", budget=4e-3)[0]["records"]
    records = same([result["records"] for result in on_ranks(jobs.train, 4, kind=kind, budget=4e-3, shard=True)])
    assert [record["action"] for record in records] == [record["action"] for record in alone]
    assert [r["alpha"] for r in records] == pytest.approx([r["alpha"] for r in alone], rel=1e-4)


@pytest.mark.parametrize("on_error", ["raise", "reject"])
@pytest.mark.parametrize(
    ("kind", "where", "error"),
    [
        ("ddp", "audit", "RuntimeError"),
        ("fsdp", "audit", "MemoryError"),
        ("fsdp", "between forwards", "RuntimeError"),
        ("fsdp", "between forwards", "KeyboardInterrupt"),
        ("ddp", "audit", "KeyboardInterrupt"),
        ("ddp", "inner", "RuntimeError"),
        ("fsdp", "inner", "RuntimeError"),
    ],
)
def test_a_failure_of_one_rank_is_a_failure_of_all(kind, where, error, on_error):
    """The step is undone everywhere, all ranks hear of it, and the next one is a step like any other."""
    results = on_ranks(jobs.failing, 2, kind=kind, where=where, error=error, on_error=on_error, shard=True)
    expected = same(on_ranks(jobs.without_step, 2, kind=kind, left_out=2))
    for rank, result in enumerate(results):
        failed = result["outcomes"][2]
        settled = on_error == "reject" and where != "inner" and error != "KeyboardInterrupt"
        if settled:
            assert failed == "reject"
        elif rank == 1:
            assert failed == f"{error}: as planned"
        else:
            assert failed == f"PeerFailed: rank 1: {error}: as planned"
        assert [o for i, o in enumerate(result["outcomes"]) if i != 2] == ["commit"] * 3
        assert result["exact"]
        assert result["weights"] == expected
        assert result["last"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_kl_of_nan_on_one_rank_is_a_rejection_on_all(kind):
    """Also under an infinite budget."""
    results = on_ranks(jobs.failing, 2, kind=kind, where="nan", error="RuntimeError", on_error="raise")
    assert same([result["outcomes"] for result in results]) == ["commit", "commit", "reject", "commit"]
    assert all(result["exact"] for result in results)
    assert same([result["weights"] for result in results]) == same(
        on_ranks(jobs.without_step, 2, kind=kind, left_out=2)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_nan_on_one_rank_are_a_rejection_on_all(kind):
    """One bad element in one shard or replica, where the control set may be blind."""
    options = {"error": "RuntimeError", "on_error": "raise", "budget": 1e9}
    results = on_ranks(jobs.failing, 2, kind=kind, where="weights", **options)
    assert same([result["outcomes"] for result in results]) == ["commit", "commit", "reject", "commit"]
    assert all(result["exact"] for result in results)
    same([result["weights"] for result in results])


def test_unequal_budgets_are_an_error_everywhere():
    """Decisions would differ: all ranks are told, before any weight moves."""
    assert "do not agree on their budgets" in same(on_ranks(jobs.unequal_budgets, 2))


def test_project_works_on_replicas_and_is_refused_on_shards():
    """Under DDP with the whole control set everywhere the replicas stay one; else the error says what to use."""
    results = on_ranks(jobs.train, 2, kind="ddp", own=True, budget=Budget(slices=2e-3), controller="Project")
    assert "project" in {record["action"] for record in same([result["records"] for result in results])}
    same([result["weights"] for result in results])
    assert "use Interpolate()" in same(on_ranks(jobs.refused, 2, kind="ddp", shard=True))
    assert "use Interpolate()" in same(on_ranks(jobs.refused, 2, kind="fsdp", shard=False))


@pytest.mark.parametrize(("budget", "action"), [(math.inf, "commit"), (1e-3, "shrink")])
def test_a_window_on_several_ranks(budget, action):
    """Several inner steps, one candidate, one decision."""
    result = same(on_ranks(jobs.windowed, 2, budget=budget))
    assert result["record"]["action"] == action
    assert result["moved"]


def test_a_process_may_decide_alone():
    """With process_group=None one rank shrinks while the other commits."""
    first, second = on_ranks(jobs.alone, 2)
    assert (first["action"], second["action"]) == ("shrink", "commit")


def test_a_log_that_is_a_path_is_written_by_the_first_rank(tmp_path):
    """One file, each step once; processes that decide alone write one each."""
    on_ranks(jobs.logged, 2, folder=str(tmp_path))
    assert [record.step for record in read_log(tmp_path / "shared.jsonl")] == [0, 1, 2]
    assert len((tmp_path / "shared.jsonl").read_text().splitlines()) == 4
    on_ranks(jobs.logged, 2, folder=str(tmp_path), group=None)
    for rank in range(2):
        assert len(read_log(tmp_path / f"own{rank}.jsonl")) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["state_dict", "dcp"])
def test_a_resumed_run_is_the_uninterrupted_one(kind, way):
    """By state dicts, and by those of torch.distributed.checkpoint."""
    for equal, whole, second in on_ranks(jobs.resumed, 2, kind=kind, way=way, budget=4e-3):
        assert equal
        assert second == whole


def test_restep_on_replicas():
    """The step again at a smaller rate, on the same gradients: replicas stay one."""
    result = same(on_ranks(jobs.restepped, 2))
    assert result["record"]["action"] == "shrink"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_nccl(kind):
    """As many ranks as there are devices: one story, and at most the budget."""
    size = min(torch.cuda.device_count(), 4)
    options = {"kind": kind, "own": True, "device": "cuda"}
    bare = on_ranks(jobs.train, size, backend="nccl", **options)
    free = on_ranks(jobs.train, size, backend="nccl", budget=math.inf, shard=size > 1, **options)
    assert [result["weights"] for result in free] == [result["weights"] for result in bare]
    held = on_ranks(jobs.train, size, backend="nccl", budget=4e-3, shard=size > 1, **options)
    records = same([result["records"] for result in held])
    assert "shrink" in {record["action"] for record in records}
    same([result["weights"] for result in held])


def alive() -> None:
    """Import what there is to import."""


def hanging() -> None:
    """Wait for a process that never comes."""
    if dist.get_rank() == 0:
        time.sleep(600)
    dist.barrier()


def test_a_hang_is_a_failure_with_the_stacks_of_those_that_hang(monkeypatch):
    """The harness itself: it does not wait for ever."""
    workers = Workers(2)
    workers.run(alive, 2, "gloo")
    monkeypatch.setattr("tests.ranks.TIMEOUT", 1)
    with pytest.raises(Hang, match="hanging"):
        workers.run(hanging, 2, "gloo")
