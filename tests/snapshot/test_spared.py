"""What is spared stays at the candidate, weights and state, wherever the rest goes."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim.snapshot.entries import CannotKeep
from step_optim.snapshot.path import Path
from step_optim.snapshot.snapshot import Snapshot
from tests.strategies import bits

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


class Nested(torch.optim.Optimizer):
    """Keeps tensors in containers of all kinds under each parameter, makes new ones, and counts in its groups."""

    def __init__(self, params: Any, lr: float = 0.1, *, shares: str = "") -> None:
        super().__init__(params, {"lr": lr, "seen": 0})
        self.common, self.count, self.shares = torch.zeros(1), 0, shares

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move everything."""
        self.common += self.shares == "tensor"
        self.count += self.shares == "number"
        if self.shares == "key":
            self.state["total"] = self.state.get("total", 0) + 1  # type: ignore[index]
        for group in self.param_groups:
            group["seen"] += 1
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("z", p.clone())
                state.setdefault("past", deque(maxlen=2)).append(p.clone())
                state.setdefault("more", {"n": [0]})["n"].append(len(state["past"]))
                if self.shares == "entry":
                    state["common"] = self.common.add_(1)
                p.add_(torch.randn_like(p))
                state["z"].add_(p)


def two_groups(seed: int, dtype: torch.dtype, before: int, **options: Any) -> tuple[Any, list[Any], Snapshot]:
    """An optimizer of five parameters in two groups after some steps, and a snapshot that is at the candidate."""
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(3, 2).to(dtype)) for _ in range(5)]
    optimizer = Nested([{"params": parameters[:3]}, {"params": parameters[3:]}], **options)
    for _ in range(before):
        optimizer.step()
    snapshot = Snapshot(optimizer, param_like="z")
    snapshot.begin()
    snapshot.capture_weights()
    snapshot.capture_rest(())
    return optimizer, parameters, snapshot


def picture(optimizer: Any, parameters: Any) -> list[Any]:
    """Weights and state of some parameters."""
    return [bits([p, optimizer.state.get(p, {})]) for p in parameters]


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    before=st.integers(0, 2),
    which=st.sets(st.integers(0, 4), min_size=1),
    keep_state=st.booleans(),
    alphas=st.lists(st.sampled_from([0.0, 0.3, 1.0]), max_size=3),
)
def test_a_rejection_is_two_halves(seed, dtype, before, which, keep_state, alphas):
    """What is spared is the candidate's; the rest is that of a rejection without it; a restore takes all back."""
    runs = []
    for spares in (True, False):
        optimizer, parameters, snapshot = two_groups(seed, dtype, before)
        start = picture(optimizer, parameters)
        with snapshot.watch_groups():
            optimizer.step()
        candidate = picture(optimizer, parameters)
        snapshot.keep_candidate()
        whole = {3, 4} <= which and not which & {0, 1, 2}
        if spares:
            snapshot.spare([parameters[i] for i in sorted(which)])
        for alpha in alphas:
            snapshot.go(alpha)
        objects = {i: optimizer.state[parameters[i]] for i in which}
        mixed = not keep_state and which not in ({3, 4}, {0, 1, 2}, {0, 1, 2, 3, 4})
        if spares and mixed:
            with pytest.raises(CannotKeep, match=r"writes one 'seen' for all of them"):
                snapshot.reject(keep_state=keep_state)
            snapshot.restore()
            assert picture(optimizer, parameters) == start
            return
        snapshot.reject(keep_state=keep_state)
        runs.append((picture(optimizer, parameters), candidate, [group["seen"] for group in optimizer.param_groups]))
        if spares:
            assert all(optimizer.state[parameters[i]] is held for i, held in objects.items())
            kept = copy.deepcopy(runs[0][2])
            snapshot.restore()
            assert picture(optimizer, parameters) == (start if not keep_state else picture(optimizer, parameters))
            if whole and not keep_state:
                assert kept == [before, before + 1]
    (with_spared, candidate, _), (without, _, _) = runs
    for i in range(5):
        assert with_spared[i] == (candidate[i] if i in which else without[i])


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    alpha=st.floats(0, 1),
    which=st.sets(st.integers(0, 4), min_size=1, max_size=4),
    bent=st.booleans(),
)
def test_every_point_has_the_candidate_where_it_is_spared(seed, dtype, alpha, which, bent):
    """On the line, on a bent way, and off it; copies of the weights too."""
    optimizer, parameters, snapshot = two_groups(seed, dtype, 1)
    optimizer.step()
    snapshot.keep_candidate()
    candidate = picture(optimizer, parameters)
    if bent:
        snapshot.bend(Path([1.0, 2.0, 3.0, 1.0, 2.0], snapshot.squares()))
    snapshot.go(alpha)
    moved = picture(optimizer, parameters)
    snapshot.spare([parameters[i] for i in which])
    assert snapshot.spared == sorted(which)
    for _ in range(2):
        snapshot.go(alpha)
        for i, now in enumerate(picture(optimizer, parameters)):
            assert now == (candidate[i] if i in which else moved[i])
        snapshot.write([torch.zeros_like(p) for p in parameters])
        for i, p in enumerate(parameters):
            assert picture(optimizer, [p])[0] == candidate[i] if i in which else not p.any()
    snapshot.go(0)
    assert not snapshot.moved()
    assert snapshot.alignment(spared=False)[0] == 0
    assert snapshot.alignment()[0] > 0


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("tensor", "keeps a tensor in its state for all parameters"),
        ("number", "keeps 'count' for all parameters"),
        ("key", "keeps 'total' for all parameters"),
        ("entry", "keeps a tensor in its state"),
    ],
)
def test_what_belongs_to_all_is_refused_before_anything_moves(shares, message):
    """A tensor, a number, a key of the state, a tensor under several parameters."""
    optimizer, parameters, snapshot = two_groups(0, torch.float32, 1, shares=shares)
    optimizer.step()
    snapshot.keep_candidate()
    candidate = picture(optimizer, parameters)
    snapshot.spare(parameters[3:])
    with pytest.raises(CannotKeep, match=message):
        snapshot.reject()
    assert picture(optimizer, parameters) == candidate
