"""Several processes, one policy: the same decision on the same bits everywhere."""

from __future__ import annotations

import math

import pytest
import torch

from step_optim import read_log
from step_optim.host import watchdog
from tests import reference
from tests.hosts import rank_jobs as jobs
from tests.hosts.ranks import on_ranks

KINDS = ["ddp", "fsdp"]

SCHEDULE = [math.inf, 1e-3, 1e-12, 1e-3, 1e-12, math.inf]
"""Budgets under which a step is committed, shrunk or rejected."""

WEIGHTS = 128 * torch.finfo(torch.float32).eps
"""Largest difference of the weights, as a part of their norm, where an all-reduce has rounded the gradient otherwise
than one process. AdamW divides by the size of each element: one whose terms cancel loses digits, and its steps lose as
many. Gradients that are off by 4 eps of their row, at random, end 37 eps apart after the six steps, at worst of 60."""


def same(values):
    """The one value that all ranks have."""
    assert all(value == values[0] for value in values), values
    return values[0]


def decisions(result):
    """What was decided, without what depends on how a sum over shards is rounded."""
    return [record | {"update_norm": None, "alpha_realised": None} for record in result["records"]]


def assert_close(result, other):
    """The same actions, on nearly the same figures, and nearly the same weights."""
    for a, b in zip(result["records"], other["records"], strict=True):
        assert a["action"] == b["action"]
        kl = b["candidate"]["mean"]
        assert a["candidate"]["mean"] == pytest.approx(kl, rel=0, abs=reference.rounding(kl))
        assert a["alpha"] == pytest.approx(b["alpha"], rel=reference.rounding(kl) / kl)
    assert math.dist(result["values"], other["values"]) < WEIGHTS * math.hypot(*other["values"])


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
@pytest.mark.parametrize(("controller", "acts"), [("Gate", "reject"), ("Interpolate", "shrink")])
def test_every_rank_takes_the_same_decision_and_ends_in_the_same_bits(kind, controller, acts):
    """Committed, shrunk and rejected steps: one story, replicas identical, rejections exact on all ranks."""
    results = on_ranks(jobs.train, 2, kind=kind, own=True, budget=SCHEDULE, controller=controller, shard=True)
    records = same([result["records"] for result in results])
    same([result["weights"] for result in results])
    assert [record["action"] for record in records] == ["commit", acts, "reject", acts, "reject", "commit"]
    assert all(record["accepted"]["mean"] <= bound for record, bound in zip(records, SCHEDULE, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shard", [True, False])
def test_more_ranks_equal_one_to_the_bit_on_the_same_gradients(kind, size, shard):
    """Figures, decisions and weights of 1, 2 and 4 ranks; whole control set everywhere, or each prompt once."""
    alone = on_ranks(jobs.train, 1, kind="plain", budget=SCHEDULE, exact=True)[0]
    results = on_ranks(jobs.train, size, kind=kind, budget=SCHEDULE, exact=True, shard=shard)
    same([result["records"] for result in results])
    for result in results:
        assert decisions(result) == decisions(alone)
        assert result["weights"] == alone["weights"]
        for a, b in zip(result["records"], alone["records"], strict=True):
            assert a["update_norm"] == pytest.approx(b["update_norm"], rel=1e-6)
            assert a["alpha_realised"] == pytest.approx(b["alpha_realised"], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_more_ranks_are_close_to_one_where_gradients_are_reduced(kind, size):
    """Each rank trains on its part of the batch; one process on all of it takes the same decisions."""
    alone = on_ranks(jobs.train, 1, kind="plain", budget=SCHEDULE)[0]
    for result in on_ranks(jobs.train, size, kind=kind, own=True, budget=SCHEDULE, shard=True):
        assert_close(result, alone)


@pytest.mark.parametrize("kind", [*KINDS, "root"])
def test_a_frozen_head_may_be_sharded(kind):
    """FSDP2 takes its whole weight away behind every forward, and the audit does without."""
    options = {"budget": [1e-4] * 6, "frozen_head": True}
    alone = on_ranks(jobs.train, 1, kind="plain", **options)[0]
    assert "shrink" in {record["action"] for record in alone["records"]}
    for result in on_ranks(jobs.train, 2, kind=kind, own=True, shard=True, **options):
        assert_close(result, alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "micro_batch"), [(2, 2), (4, 2), (2, 3)])
def test_a_sharded_control_set_measures_what_one_process_measures(kind, size, micro_batch):
    """All prompts, every slice, drift: to the bit, whatever the number of ranks, of unequal parts too."""
    ((_, alone),) = on_ranks(jobs.movement, 1, kind="plain", micro_batch=micro_batch)
    for sharded, record in on_ranks(jobs.movement, size, kind=kind, micro_batch=micro_batch):
        assert sharded
        for name in ("candidate", "accepted", "reference_drift"):
            assert record[name] == alone[name]


def test_gradients_are_averaged_by_the_number_of_prompts():
    """The weighted mean of all ranks, of real and complex tensors."""
    assert same(on_ranks(jobs.averaged, 2)) == [[1.75, 1.75], [0.75j]]


def test_unequal_budgets_are_an_error_everywhere():
    """Decisions would differ: all ranks are told, before any weight moves."""
    assert "do not agree on their budgets" in same(on_ranks(jobs.unequal_budgets, 2))


@pytest.mark.parametrize("shard", [True, False])
def test_an_automatic_budget_is_fixed_alike_everywhere(shard):
    """Each rank trains and measures its part, and all of them have the pooled figures; one process fixes the same."""
    found = [same(on_ranks(jobs.chosen, size, kind="ddp", shard=shard)) for size in (2, 1)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert list(found[0]) == ["mean", "slice:a", "slice:b"]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_all_ranks_measure_count_once(kind):
    """Confidence bounds and standard errors are those of one process, whole or in parts."""
    alone, whole, parts = (
        same(on_ranks(jobs.bounded, size, kind=kind, shard=shard))
        for size, shard in ((1, False), (2, False), (2, True))
    )
    assert alone == pytest.approx(whole, rel=1e-3)
    assert alone == pytest.approx(parts, rel=1e-3)


def test_project_works_on_replicas():
    """Under DDP with the whole control set everywhere the replicas stay one."""
    results = on_ranks(jobs.train, 2, kind="ddp", own=True, budget={"slices": 2e-3}, controller="Project")
    assert "project" in {record["action"] for record in same([result["records"] for result in results])}
    same([result["weights"] for result in results])


@pytest.mark.parametrize("controller", ["Steer", "pull"])
@pytest.mark.parametrize("shard", [False, True])
def test_steer_works_on_replicas(shard, controller):
    """Under DDP, with the control set everywhere or a part of it, the replicas stay one, inside of the caps."""
    budget = {"drift": 1e-3, "drift_slices": {"a": 2e-3}}
    results = on_ranks(jobs.train, 2, kind="ddp", own=True, budget=budget, controller=controller, shard=shard)
    records = same([result["records"] for result in results])
    assert "steer" in {record["action"] for record in records}
    assert max(record["reference_drift"]["mean"] for record in records) <= 1e-3
    assert any(record["pull"] for record in records) == (controller == "pull")
    same([result["weights"] for result in results])


@pytest.mark.parametrize("controller", ["Steer", "pull"])
@pytest.mark.parametrize("kind", ["fsdp", "root"])
def test_steer_works_on_weights_in_pieces(kind, controller):
    """FSDP2 has split them: every process corrects its part, and the whole ends where one process would end."""
    options = {"budget": {"drift": 1e-3, "drift_slices": {"a": 2e-3}}, "controller": controller, "exact": True}
    results = on_ranks(jobs.train, 2, kind=kind, **options)
    records = same([result["records"] for result in results])
    assert "steer" in {record["action"] for record in records}
    assert max(record["reference_drift"]["mean"] for record in records) <= 1e-3
    assert any(record["pull"] for record in records) == (controller == "pull")
    alone = same(on_ranks(jobs.train, 1, kind="ddp", **options))
    assert same([result["values"] for result in results]) == pytest.approx(alone["values"], rel=1e-3, abs=1e-4)


def test_gradients_of_pieces_leave_the_loops_own():
    """What FSDP2 reduces for a direction does not end in `.grad`, and a loop that reduces later goes on to do so."""
    assert same(on_ranks(jobs.gradients_aside, 2)) is True


def test_gradients_of_pieces_may_compute_layers_again():
    """Under FSDP2 too they are what they are without."""
    (plain, _), (again, calls) = (same(on_ranks(jobs.gradient_of_layers, 2, recompute=r)) for r in (False, True))
    assert again == pytest.approx(plain, rel=1e-5)
    assert calls == 2 * (8 + 8)  # forward and backward of both layers, of each of eight prompts alone


@pytest.mark.parametrize("output", ["logits", "normal"])
def test_steer_works_on_policies_in_pieces(output):
    """A PolicyKL that knows its model; it ends where one process ends."""
    parts = same(on_ranks(jobs.policy_in_pieces, 2, kind="fsdp", output=output))
    alone = same(on_ranks(jobs.policy_in_pieces, 1, kind="plain", output=output))
    assert "steer" in parts["actions"]
    assert parts["actions"] == alone["actions"]
    assert parts["values"] == pytest.approx(alone["values"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["mean", "slice:even", "drift", "prompt"])
def test_gradients_of_own_observations_are_those_of_all(name):
    """Processes with two and six of them: the mean over eight, and the worst of eight, as audits read it."""
    for pooled, whole in on_ranks(jobs.normal_of_parts, 2, name=name, sizes=[2, 6]):
        assert pooled == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_pools_that_differ_between_processes_in_pieces():
    """The same of what directions are drawn from."""
    told = same(on_ranks(jobs.steer_on_pieces, 2, sizes=[3, 3], pools=[3, 5], budget={"drift": 0.1}))
    assert "every process needs as many observations as the others" in told


@pytest.mark.parametrize(
    ("sizes", "budget", "message"),
    [
        ([4, 4], {"drift": 0.1}, "taken"),
        ([2, 6], {"drift": 0.1}, "every process needs as many observations as the others"),
        ([4, 4], {"drift": 0.1, "prompt": 0.1}, "it cannot steer by the worst of observations"),
    ],
)
def test_observations_that_differ_between_processes_in_pieces(sizes, budget, message):
    """FSDP2's gradients are plain means over processes, and what they would weigh otherwise is refused."""
    assert message in same(on_ranks(jobs.steer_on_pieces, 2, sizes=sizes, budget=budget))


def test_steer_is_refused_where_weights_and_control_set_are_in_pieces():
    """The error says what to use."""
    assert "shard=False" in same(on_ranks(jobs.refused, 2, kind="fsdp", shard=True, controller="Steer"))


@pytest.mark.parametrize(("kind", "shard"), [("ddp", True), ("fsdp", False)])
def test_project_is_refused_on_shards(kind, shard):
    """Of the control set or of weights; the error says what to use."""
    assert "use Interpolate()" in same(on_ranks(jobs.refused, 2, kind=kind, shard=shard))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("budget", "action"), [(math.inf, "commit"), (1e-3, "shrink"), (1e-12, "reject")])
def test_a_window_on_several_ranks(kind, budget, action):
    """Several inner steps, one candidate, one decision."""
    result = same(on_ranks(jobs.windowed, 2, kind=kind, budget=budget))
    assert result["record"]["action"] == action
    assert result["moved"] == (action != "reject")


def test_a_process_may_decide_alone():
    """With process_group=None one rank shrinks while the other commits."""
    first, second = on_ranks(jobs.alone, 2)
    assert (first["action"], second["action"]) == ("shrink", "commit")


def test_a_process_group_decides_by_itself():
    """Two pairs of ranks, two policies."""
    stories = on_ranks(jobs.in_pairs, 4)
    assert [story["action"] for story in stories] == ["shrink", "shrink", "commit", "commit"]
    assert stories[0] == stories[1]


def test_a_log_that_is_a_path_is_touched_by_the_first_rank_only(tmp_path):
    """Each step once; processes that decide alone write one each."""
    on_ranks(jobs.logged, 2, folder=str(tmp_path / "together"))
    assert [record.step for record in read_log(tmp_path / "together" / "rank0" / "log.jsonl")] == [0, 1, 2]
    assert not (tmp_path / "together" / "rank1").exists()
    on_ranks(jobs.logged, 2, folder=str(tmp_path / "alone"), group=None)
    for rank in range(2):
        assert len(read_log(tmp_path / "alone" / f"rank{rank}" / "log.jsonl")) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["state_dict", "dcp"])
def test_a_resumed_run_is_the_uninterrupted_one(kind, way, tmp_path):
    """By state dicts, and from the files of torch.distributed.checkpoint."""
    for equal, whole, second in on_ranks(jobs.resumed, 2, kind=kind, folder=str(tmp_path), way=way, budget=4e-3):
        assert equal
        assert second == whole


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_nccl(kind):
    """As many ranks as there are devices: one story, and at most the budget."""
    size = min(torch.cuda.device_count(), 4)
    options = {"kind": kind, "own": True, "device": "cuda"}
    bare = on_ranks(jobs.train, size, backend="nccl", **options)
    free = on_ranks(jobs.train, size, backend="nccl", budget=math.inf, shard=True, **options)
    assert [result["weights"] for result in free] == [result["weights"] for result in bare]
    held = on_ranks(jobs.train, size, backend="nccl", budget=4e-3, shard=True, **options)
    records = same([result["records"] for result in held])
    assert "shrink" in {record["action"] for record in records}
    assert all(record["accepted"]["mean"] <= 4e-3 for record in records)
    same([result["weights"] for result in held])


def test_a_process_that_waits_long_says_for_what(tmp_path):
    """While the group is made, and in an exchange: who waits since when, and what may be the matter; again and again.

    The other process goes on only when it has been said twice.
    """
    first, second = on_ranks(jobs.late, 2, folder=str(tmp_path))
    assert len(first) >= 4
    assert second == []
    for text in first:
        assert text.startswith("rank 0, ")
        assert "has been waiting since" in text
        assert "the other processes have not reached this step" in text
        assert "wrap its optimizer in STEPOptimizer and call step() equally often?" in text
    assert "making the group" in first[0]
    assert "exchanging" in first[-1]


def test_a_wait_is_told_after_the_patience_and_again(caplog):
    """On a clock of our own: nothing before the patience is over, then once every `AGAIN` seconds."""
    wait = watchdog._Wait("rank 3, counting,", since=0.0)
    told = []
    for second in range(int(watchdog.PATIENCE + 2 * watchdog.AGAIN) + 2):
        caplog.clear()
        wait.tell(float(second))
        told += [second] * len(caplog.records)
    assert told == [watchdog.PATIENCE, watchdog.PATIENCE + watchdog.AGAIN, watchdog.PATIENCE + 2 * watchdog.AGAIN]
    assert caplog.records == []


def test_a_wait_that_ends_is_forgotten_and_one_thread_watches_all():
    """Also one that ends in an error."""
    dog = watchdog.Watchdog()
    with pytest.raises(ZeroDivisionError), dog.waiting("rank 0"):
        assert len(dog._waits) == 1
        thread = dog._thread
        with dog.waiting("rank 0"):
            assert dog._thread is thread
            assert len(dog._waits) == 2
        raise ZeroDivisionError
    assert dog._waits == {}
    assert thread.daemon
