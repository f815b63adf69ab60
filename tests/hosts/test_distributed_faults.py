"""One of several processes fails: all undo the step, all hear of it, nobody waits for ever, and training goes on."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from tests.hosts import rank_jobs as jobs
from tests.hosts.ranks import Hang, Workers, on_ranks
from tests.hosts.test_distributed import KINDS, same


@pytest.mark.parametrize("on_error", ["raise", "reject"])
@pytest.mark.parametrize(
    ("kind", "where", "error"),
    [
        ("ddp", "audit", "RuntimeError"),
        ("fsdp", "audit", "MemoryError"),
        ("ddp", "audit", "KeyboardInterrupt"),
        ("fsdp", "audit", "KeyboardInterrupt"),
        ("ddp", "forward", "MemoryError"),
        ("fsdp", "forward", "MemoryError"),
        ("root", "forward", "RuntimeError"),
        ("ddp", "inner", "RuntimeError"),
        ("fsdp", "inner", "RuntimeError"),
        ("ddp", "loss", "RuntimeError"),
        ("fsdp", "loss", "KeyboardInterrupt"),
        ("ddp", "describe", "KeyboardInterrupt"),
    ],
)
def test_a_failure_of_one_rank_is_a_failure_of_all(kind, where, error, on_error):
    """The step is undone everywhere, all ranks hear of it, and the next one is a step like any other."""
    results = on_ranks(jobs.failing, 2, kind=kind, where=where, error=error, on_error=on_error, nth=2)
    expected = same(on_ranks(jobs.without_step, 2, kind=kind, left_out=2))
    for rank, result in enumerate(results):
        failed = result["outcomes"][2]
        settled = on_error == "reject" and where in ("audit", "forward") and error != "KeyboardInterrupt"
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


@pytest.mark.parametrize("culprit", [0, 3])
def test_a_failure_of_one_of_four(culprit):
    """In the midst of a forward that gathers weights from all of them."""
    results = on_ranks(jobs.failing, 4, kind="fsdp", where="forward", culprit=culprit)
    assert [result["outcomes"][2] == "RuntimeError: as planned" for result in results] == [
        rank == culprit for rank in range(4)
    ]
    assert all(result["exact"] for result in results)
    assert same([result["weights"] for result in results]) == same(
        on_ranks(jobs.without_step, 4, kind="fsdp", left_out=2)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("where", "budget"), [("nan", float("inf")), ("weights", 1e9)])
def test_a_nan_on_one_rank_is_a_rejection_on_all(kind, where, budget):
    """A KL of NaN, also under an infinite budget; one bad element in one shard or replica."""
    results = on_ranks(jobs.failing, 2, kind=kind, where=where, budget=budget)
    assert same([result["outcomes"] for result in results]) == ["commit", "commit", "reject", "commit"]
    assert all(result["exact"] for result in results)
    assert same([result["weights"] for result in results]) == same(
        on_ranks(jobs.without_step, 2, kind=kind, left_out=2)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_kl_closure_may_hide_what_it_hears(kind):
    """It makes another error of the failure of another rank: that rank is not told a second time."""
    assert same(on_ranks(jobs.hiding, 2, kind=kind)) == ["commit", "reject", "commit"]


def test_ranks_may_measure_with_different_numbers_of_forwards():
    """Under FSDP2, where only the first of them gathers weights: decisions are not confused by the others."""
    assert [story["action"] for story in same(on_ranks(jobs.uneven, 2))] == ["commit"] * 3


def test_a_failure_where_the_others_broadcast_buffers():
    """A closure that calls the DistributedDataParallel module itself: nobody waits for the rank that does not come."""
    assert same(on_ranks(jobs.broadcasting, 2)) == ["commit", "reject", "commit"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_in_a_window_on_one_rank(kind):
    """All go back to the weights before the window, and train on in step."""
    results = on_ranks(jobs.broken_window, 2, kind=kind)
    assert [outcome for outcome, _, _ in results] == [
        "PeerFailed: rank 1: RuntimeError: as planned",
        "RuntimeError: as planned",
    ]
    assert all(restored for _, restored, _ in results)
    same([weights for _, _, weights in results])


def idle() -> int:
    """Do nothing."""
    return dist.get_rank()


def hanging() -> None:
    """Fail on one rank, while the other waits for something that never comes."""
    if dist.get_rank() == 0:
        raise ValueError("on purpose")
    time.sleep(600)


def test_the_harness_does_not_wait_for_ever(monkeypatch):
    """A hang is a failure, with the stacks of those that hang and the errors of the others."""
    monkeypatch.setattr("tests.hosts.ranks.TIMEOUT_AFTER_AN_ERROR", 1)
    workers = Workers()
    workers.start(2)
    with pytest.raises(Hang, match=r"(?s)rank 0:.*ValueError: on purpose.*rank 1 hangs:.*in hanging"):
        workers.run(hanging, 2)


def test_the_harness_tells_what_was_raised():
    """An error of a job is an error of the test, with the rank that it comes from; results are in order."""
    assert on_ranks(idle, 2) == [0, 1]
    with pytest.raises(RuntimeError, match=r"(?s)rank 0:.*rank 1:.*TypeError"):
        on_ranks(idle, 2, unknown=1)


@pytest.mark.parametrize("where", ["anchor", "audit_with_drift"])
@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp"])
def test_a_held_out_audit_that_fails_on_one_rank_decides_nothing(kind, where):
    """All of them record it, and go on as if there were no held-out prompts in that step."""
    broken = on_ranks(jobs.held_out_failing, 2, kind=kind, where=where, fails=True)
    sound = on_ranks(jobs.held_out_failing, 2, kind=kind, where=where, fails=False)
    assert [each["weights"] for each in broken] == [each["weights"] for each in sound]
    for rank, (found, wanted) in enumerate(zip(broken, sound, strict=True)):
        *first, third, fourth = found["records"]
        assert [*first, fourth] == [*wanted["records"][:2], wanted["records"][3]]
        action, measured, told, error, moved = third
        assert (action, measured, error) == ("commit", False, None)
        assert told.startswith("RuntimeError" if rank == 1 else "PeerFailed: rank 1: RuntimeError")
        assert moved == wanted["records"][2][-1]
