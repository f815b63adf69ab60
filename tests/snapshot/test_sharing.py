"""Tensors that share memory, or no longer do, and captures that are interrupted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from step_optim import Gate, Interpolate, PolicyKL, Project, STEPOptimizer
from step_optim.snapshot.store import TensorStore
from tests.strategies import bits


def test_parameters_that_shared_memory_and_no_longer_do() -> None:
    """One that was given memory of its own between two steps is part of the policy, and rolls back."""
    a = nn.Parameter(torch.zeros(3))
    b = nn.Parameter(torch.zeros(3))
    b.data = a.data
    optimizer = STEPOptimizer(
        torch.optim.SGD([a, b], lr=1.0), kl=PolicyKL(lambda: torch.stack([a, b])), budget=1e9, controller=Gate()
    )
    for limit in (1e9, 1e-9):
        if limit < 1:
            b.data = b.data.clone()
        before = bits(a), bits(b)
        a.grad, b.grad = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
        optimizer.set_budget(limit)
        optimizer.step()
    assert optimizer.last.action == "reject"
    assert (bits(a), bits(b)) == before


@pytest.mark.parametrize("moves", [(1.0, 1.0), (1.0, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("controller", [Gate(), Interpolate(), Project(steps=1)])
def test_a_step_that_parts_what_shared_memory(moves, controller) -> None:
    """An inner step that gives every parameter new memory: each is on its own line, or both are one again."""
    a = nn.Parameter(torch.zeros(3))
    b = nn.Parameter(torch.zeros(3))
    b.data = a.data
    way = torch.tensor([1.0, 2.0, 4.0])

    class Parts(torch.optim.SGD):
        def step(self, closure=None):
            for p, size in zip((a, b), moves, strict=True):
                p.data = p.data + size * way

    optimizer = STEPOptimizer(
        Parts([a, b], lr=1.0), kl=PolicyKL(lambda: torch.stack([a, b])), budget=1e-2, controller=controller
    )
    a.grad = b.grad = torch.zeros(3)
    optimizer.step()
    record = optimizer.last
    assert record.triggered
    if record.action == "reject":
        assert a.tolist() == b.tolist() == [0.0, 0.0, 0.0]
        assert a.data_ptr() == b.data_ptr()
        return
    assert 0 < record.accepted.mean <= 1e-2
    assert a.data_ptr() != b.data_ptr()
    if record.action == "shrink":
        for p, size in zip((a, b), moves, strict=True):
            torch.testing.assert_close(p.detach(), record.alpha * size * way)


@pytest.mark.parametrize(("size", "where"), [(4, "store._Bucket"), (3, "store.TensorCopy.aim")])
def test_a_capture_that_is_interrupted_vouches_for_nothing(monkeypatch, size, where) -> None:
    """After an interrupt while buffers are made anew, or given other tensors, the store covers nothing."""
    tensors = [torch.ones(3), torch.ones(2, dtype=torch.float64)]
    store = TensorStore()
    store.capture(tensors)
    moved = [torch.ones(size), tensors[1]]
    monkeypatch.setattr(f"step_optim.snapshot.{where}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.capture(moved)
    assert not store.covers(tensors)
    assert not store.covers(moved)
