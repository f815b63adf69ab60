"""The way between two points: exact at both ends, in every dtype, and measured where it was rounded."""

from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim import Action, Budget, Gate, Interpolate, PolicyKL, Project, STEPOptimizer
from step_optim.snapshot import store as stores
from step_optim.snapshot.weights import Weights
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
        weights, state = optimizer._snapshot._weights, optimizer._snapshot._state
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


LAYOUTS = {
    "clone": lambda data: data.clone(),
    "elsewhere": lambda data: torch.empty(data.numel() + 1, dtype=data.dtype)[1:].view(data.shape).copy_(data),
    "transposed": lambda data: data.clone() if data.dim() < 2 else data.transpose(0, -1).contiguous().transpose(0, -1),
    "gaps": lambda data: torch.zeros(*data.shape, 2, dtype=data.dtype)[..., 0].copy_(data),
}
"""Ways to give a weight other memory that holds the same values."""

ALL_DTYPES = [*DTYPES, torch.complex128, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]


class Swaps(torch.optim.Optimizer):
    """Puts `.data` of its weights somewhere else, and adds what is in `moves` to them."""

    def __init__(self, weights: list[torch.nn.Parameter], layout: str, moves: list[torch.Tensor | None]) -> None:
        super().__init__(weights, {"lr": 1.0})
        self._layout, self._moves = LAYOUTS[layout], moves

    @torch.no_grad()
    def step(self, closure=None):
        for weight, move in zip(self.param_groups[0]["params"], self._moves, strict=True):
            weight.data = self._layout(weight.data)
            if move is not None:
                weight.data.copy_((weight.data.double() + move).to(weight.dtype))


@pytest.mark.filterwarnings("ignore:the step moved nothing")
@given(
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from(ALL_DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_data_that_was_only_put_elsewhere_has_not_moved(shape, dtype, layout):
    """Whatever shape, dtype and layout: no bit moved, so the step is unchanged and its norm is zero."""
    values = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.nn.Parameter(values, requires_grad=False)
    optimizer = STEPOptimizer(Swaps([weight], layout, [None]), kl=lambda: 0.0, budget=1.0)
    for _ in range(2):
        optimizer.step()
        assert (optimizer.last.action, optimizer.last.update_norm) == (Action.UNCHANGED, 0.0)
        assert bits(weight.detach().clone(memory_format=torch.contiguous_format)) == bits(values)


@given(
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    controller=st.sampled_from([Gate, Interpolate]),
    seed=st.integers(0, 1000),
)
def test_data_that_was_put_elsewhere_and_moved(shape, dtype, layout, controller, seed):
    """The norm is that of the difference; half of the step is half way; a rejection leaves no trace, nor other memory.

    The other weight is put elsewhere and stays what it is.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator).to(dtype)
    move = 1 + torch.rand(shape, generator=generator).double()
    weight, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(2, 3, dtype=dtype))
    address, before = weight.data_ptr(), bits(weight)
    target = (start.double() + move).to(dtype)
    length = float((target.double() - start.double()).square().sum())
    optimizer = STEPOptimizer(
        Swaps([weight, other], layout, [move, None]),
        kl=lambda: float((weight.double() - start.double()).square().sum()) / length,
        budget=0.25,
        controller=controller(),
    )
    optimizer.step()
    assert optimizer.last.update_norm == pytest.approx(math.sqrt(length), rel=1e-6)
    if controller is Gate:
        assert (optimizer.last.action, bits(weight), weight.data_ptr()) == (Action.REJECT, before, address)
        return
    part = optimizer.last.alpha
    expected = torch.lerp(start, target, part).double()
    assert (weight.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert optimizer.last.accepted.mean <= 0.25
    assert bits(other) == bits(torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize("change", [lambda data: data.half(), lambda data: data.flatten(), lambda data: data[:1]])
def test_data_of_another_kind_is_refused_in_the_step(change):
    """There is no line between weights of two dtypes or shapes: the message has both, and nothing has changed."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    inner = Swaps([weight], "clone", [None])
    inner._layout = change
    optimizer = STEPOptimizer(inner, kl=lambda: 0.0, budget=1.0)
    with pytest.raises(RuntimeError, match=r"\.data from float32 of shape \(2, 3\) on cpu to"):
        optimizer.step()
    assert bits(weight) == bits(torch.ones(2, 3))


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
        pinned = [copy.bits.is_pinned() for copy in optimizer._snapshot._weights._store.copies]
        assert pinned == [snapshot == "cpu"] * 4
    for (action, weights), (other, others) in zip(seen["device"], seen["cpu"], strict=True):
        assert action == other
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
