"""A flight recorder with several processes: the first writes, and all measure together."""

from __future__ import annotations

import pytest

from tests.flight import rank_jobs as jobs
from tests.hosts.ranks import on_ranks


@pytest.mark.parametrize("shard", [False, True])
def test_all_processes_read_the_same_figures_and_train_on_as_if_they_had_not(tmp_path, shard):
    """Also where each has a part of the control set, and where the first process alone sees the folder."""
    looked = on_ranks(jobs.look_back, 2, folder=str(tmp_path / "a"), look=True, budget=1e-3, shard=shard)
    plain = on_ranks(jobs.look_back, 2, folder=str(tmp_path / "b"), look=False, budget=1e-3, shard=shard)
    assert looked[0]["record"] == looked[1]["record"]
    assert looked[0]["parts"] == looked[1]["parts"]
    for a, b in zip(looked, plain, strict=True):
        assert (a["weights"], a["last"]) == (b["weights"], b["last"])
    assert [result["kept"] for result in looked] == [[0, 1, 2, 3, 4], []]
    record, parts = looked[0]["record"], looked[0]["parts"]
    still, _, whole = record["trials"][-3:]
    assert still["movement"]["mean"] == 0
    assert whole["movement"] == record["candidate"] == parts["candidate"]
    assert {part["name"] for part in parts["parts"]} == {"module.embed", "module.lm_head"}  # inside of DDP
    assert all(part["first_order"] for part in parts["parts"])


def test_a_failure_of_the_first_process_reaches_all(tmp_path):
    """Nobody waits for ever, and training goes on."""
    first, second = on_ranks(jobs.fails_in_the_first, 2, folder=str(tmp_path))
    assert [text.partition(":")[0] for text in first] == ["ValueError"] * 2
    assert [text.partition(":")[0] for text in second] == ["PeerFailed"] * 2
    assert all("has kept none yet" in text for text in first + second)


def test_weights_in_pieces_are_refused(tmp_path):
    """At construction, with what helps."""
    told = on_ranks(jobs.splits, 2, folder=str(tmp_path))
    assert all("split over processes (FSDP2)" in text and "recorder=None" in text for text in told)
