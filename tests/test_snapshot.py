"""The way between two points: exact at both ends, in every dtype, and measured where it was rounded."""

from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Budget, Gate, Interpolate, PolicyKL, Project, STEPOptimizer
from step_optim import store as stores
from step_optim.snapshot import Weights
from tests.strategies import bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def two_points(seed: int, dtype: torch.dtype, scale: float) -> tuple[Weights, torch.nn.Parameter, object, object]:
    """Weights at a candidate, with theta_t behind them; and the bits of both."""
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(5, 3, dtype=dtype).t())
    weights = Weights(torch.optim.SGD([weight], lr=1.0))
    weights.capture()
    previous = bits(weight)
    with torch.no_grad():
        weight.add_(torch.randn(3, 5, dtype=dtype) * scale)
    weights.keep_candidate()
    return weights, weight, previous, bits(weight)


@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]),
    alphas=st.lists(st.floats(0, 1), max_size=4),
)
def test_both_ends_are_exact_wherever_one_comes_from(seed, dtype, scale, alphas):
    """At 0 the weights are theta_t, at 1 the candidate, bit for bit; every alpha gives the same bits each time."""
    weights, weight, previous, candidate = two_points(seed, dtype, scale)
    seen = {}
    for alpha in [*alphas, 0.0, *alphas, 1.0, *alphas, 0.0, 1.0]:
        weights.go(alpha)
        assert seen.setdefault(alpha, bits(weight)) == bits(weight)
    assert seen[0.0] == previous
    assert seen[1.0] == candidate


@given(seed=st.integers(0, 10_000), alpha=st.floats(0.01, 0.99), dtype=st.sampled_from(DTYPES[2:]))
def test_the_realised_alpha_is_the_one_asked_for_where_rounding_allows(seed, alpha, dtype):
    """In full precision the weights are where they were asked to be."""
    weights, _, _, _ = two_points(seed, dtype, 1.0)
    weights.go(alpha)
    along, length = weights.alignment()
    assert along / length == pytest.approx(alpha, rel=1e-4)


def test_an_update_is_measured_and_an_overflow_is_named():
    """The norm is that of the difference; a weight that became inf makes it not finite."""
    weight = torch.nn.Parameter(torch.zeros(2))
    weights = Weights(torch.optim.SGD([weight], lr=1.0))
    weights.capture()
    assert weights.update().read() == (False, 0.0)
    with torch.no_grad():
        weight.copy_(torch.tensor([3.0, 4.0]))
    assert weights.update().read() == (True, 25.0)
    with torch.no_grad():
        weight[0] = math.inf
    moved, square = weights.update().read()
    assert moved
    assert not math.isfinite(square)


SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4)]


def some_tensors(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of every layout that optimizers are known to keep: sliced, transposed, expanded, scalar, empty."""
    generator = torch.Generator().manual_seed(seed)
    dense = [torch.randint(-9, 9, shape, generator=generator).to(dtype) for shape in SHAPES]
    base = torch.randint(-9, 9, (6, 8), generator=generator).to(dtype)
    return [*dense, base.t()[2:5], base[:, ::3], torch.ones(1, 3).to(dtype).expand(4, 3), torch.zeros(2, 2).to(dtype)]


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([*DTYPES, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]),
    chunk=st.sampled_from([1, 8, 10_000]),
    host=st.booleans(),
)
def test_a_store_puts_every_layout_back(seed, dtype, chunk, host):
    """Whatever is captured, in whatever pieces it is compared, an edit is seen and the old bits return."""
    tensors = some_tensors(seed, dtype)
    with mock.patch.dict(stores.CHUNK, cpu=chunk):
        store = stores.TensorStore(host=host)
        store.capture(tensors)
        assert [copy.tensor is tensor for copy, tensor in zip(store.copies, tensors, strict=True)] == [True] * len(
            tensors
        )
        assert not store.changed()
        for tensor in tensors:
            if tensor.numel() == 0:
                continue
            before = bits(tensor)
            (tensor if tensor.stride() != (0, 1) else tensor[0]).copy_(torch.full((), 3).to(dtype))
            assert bool(store.changed()) == (bits(tensor) != before)
            store.restore()
            assert bits(tensor) == before
            assert not store.changed()


def test_buffers_and_plan_are_kept_from_step_to_step():
    """A training run copies into the same memory at every step: theta_t, the candidate, the optimizer's state."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = STEPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1.0), kl=PolicyKL(lambda: model(torch.eye(3))), budget=1e-3
    )
    held = []
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        assert optimizer.last.triggered
        weights, state = optimizer._parts.weights, optimizer._parts.state
        stores_ = (weights._store, weights._candidate, state._tensors)
        held.append([copy.bits.data_ptr() for store in stores_ for copy in store.copies])
    assert held[1] == held[2] == held[3]


@pytest.mark.parametrize("controller", [Interpolate(), Gate(), Project(steps=1)])
def test_a_snapshot_on_the_host_changes_nothing(controller):
    """The same steps, bit for bit, as with the snapshot beside the weights."""

    def run(snapshot: str) -> list:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 4)
        optimizer = STEPOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.5),
            kl=PolicyKL(lambda: model(torch.eye(3))),
            budget=Budget(mean=1e-3),
            controller=copy.deepcopy(controller),
            snapshot=snapshot,
        )
        seen = []
        for step in range(5):
            for p in model.parameters():
                p.grad = torch.randn(p.shape)
            if step == 3:
                model.weight.data.mul_(1.1)  # by somebody else: noticed
            optimizer.step()
            seen.append((optimizer.last.accepted, optimizer.last.alpha, [bits(p) for p in model.parameters()]))
        return seen

    assert run("cpu") == run("device")


def test_an_unknown_snapshot_is_refused():
    """The message names the argument, the value and the choice."""
    with pytest.raises(ValueError, match="snapshot='disk' is unknown; use 'device' or 'cpu'"):
        STEPOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), budget=1.0, snapshot="disk")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_snapshot_in_pinned_memory():
    """On CUDA the copies lie in pinned host memory, the steps are those of snapshot="device", and rollbacks exact."""
    seen = {}
    for snapshot in ("device", "cpu"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 32)).cuda()
        inputs = torch.randn(16, 64, device="cuda")
        optimizer = STEPOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.1),
            kl=PolicyKL(lambda model=model, inputs=inputs: model(inputs)),
            budget=Budget(mean=1e-3),
            controller=Gate(patience=2),
            snapshot=snapshot,
        )
        steps = []
        for _ in range(6):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, device="cuda")
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            if optimizer.last.action == "reject":
                assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            steps.append((optimizer.last.action, [p.detach().cpu() for p in model.parameters()]))
        seen[snapshot] = steps
        pinned = [copy.bits.is_pinned() for copy in optimizer._parts.weights._store.copies]
        assert pinned == [snapshot == "cpu"] * 4
    for (action, weights), (other, others) in zip(seen["device"], seen["cpu"], strict=True):
        assert action == other
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
