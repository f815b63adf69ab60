"""Partial commits with several processes: they agree on what is read."""

from __future__ import annotations

import pytest

from tests.hosts.ranks import on_ranks
from tests.step import rank_jobs as jobs


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_all_processes_keep_the_same_and_stay_replicas(shard, gate):
    """Also where each measures a part of the control set; the critic is that of a bare optimizer."""
    first, second = on_ranks(jobs.partial_steps, 2, shard=shard, gate=gate)
    assert first == second
    assert first["names"] == ["param_groups[0]['params'][3]", "param_groups[0]['params'][4]"]
    assert first["critic"] == first["alone"]
    assert [record["kept"] for record in first["records"]] == [2, 2, 2]


def test_weights_in_pieces_are_refused():
    """At construction, with what helps."""
    assert all("FSDP2 has split the weights" in text for text in on_ranks(jobs.splits, 2))


def test_a_failure_while_it_is_measured_reaches_all():
    """Nobody waits for ever, and training goes on alike."""
    first, second = on_ranks(jobs.finds_something_else, 2, step=2)
    assert (first[0], second[0]) == ("PeerFailed", "RuntimeError")
    assert first[1] == second[1]
