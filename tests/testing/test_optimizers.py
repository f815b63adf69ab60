"""Every optimizer in torch.optim and bitsandbytes' 8-bit ones: exact rollback, transparent commits, budgets."""

from __future__ import annotations

import copy
import inspect
import math

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from step_optim import Action, Gate, Interpolate, STEPOptimizer
from tests.strategies import bits, picture

TORCH = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
)
BITSANDBYTES = ["AdamW8bit", "Adam8bit", "Lion8bit", "PagedAdamW8bit"]
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
REJECTED_AT = [0, 0, 1, 4, 5, 5, 8]
DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp16": [torch.float16],
    "mixed": [torch.float32, torch.bfloat16],
}


class Net(nn.Module):
    """Two matrices, large enough for bitsandbytes to quantize their state."""

    def __init__(self, dtypes: list[torch.dtype], sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(80, 64, sparse=sparse).to(dtypes[0])
        self.out = nn.Linear(64, 80, bias=False).to(dtypes[-1])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(ids).to(self.out.weight.dtype)).float()


def make(name: str, parameters: list[nn.Parameter], dtype: str) -> torch.optim.Optimizer:
    options = {"LBFGS": {"lr": 0.1, "max_iter": 3}, "SGD": {"lr": 0.01, "momentum": 0.9}, "Adafactor": {"lr": 1e-2}}
    if hasattr(torch.optim, name):
        cls, chosen = getattr(torch.optim, name), options.get(name, {"lr": 1e-3})
        if dtype == "fp16" and "eps" in inspect.signature(cls).parameters and name != "Adafactor":
            chosen["eps"] = 1e-4  # the defaults are 0 in fp16, and the bare optimizer divides by it
        return cls(parameters, **chosen)
    return getattr(bnb.optim, name)(parameters, lr=1e-3)


def build(name: str, dtype: str) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    sparse = name == "SparseAdam"
    net = Net(DTYPES[dtype], sparse)
    trained = [net.table.weight] if sparse else list(net.parameters())
    return net, make(name, trained, dtype)


def train(net: Net, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One training step, with a loss closure where the optimizer needs one."""
    ids = torch.randint(0, 80, (12,), generator=torch.Generator().manual_seed(step))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(ids), (ids * 7) % 80)
        loss.backward()
        return loss

    if isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


CASES = [
    (name, dtype)
    for name in TORCH + BITSANDBYTES
    for dtype in DTYPES
    if not (name in BITSANDBYTES and dtype == "mixed")
]


def runs_bare(name: str, dtype: str) -> bool:
    """Whether the bare optimizer takes this dtype at all."""
    net, optimizer = build(name, dtype)
    try:
        for step in range(3):
            train(net, optimizer, step)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return False
    return all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_rejects_leave_no_trace_and_commits_are_transparent(name, dtype):
    """A run with rejects at steps 0, 0, 1, 4, 5, 5, 8 ends in the bits of the bare run without them."""
    if not runs_bare(name, dtype):
        pytest.skip(f"bare {name} does not run in {dtype}")
    bare_net, bare = build(name, dtype)
    net, inner = build(name, dtype)
    kl = [0.0]
    optimizer = STEPOptimizer(inner, kl=lambda: kl[0], budget=0.5, controller=Gate())
    for step in range(9):
        for _ in range(REJECTED_AT.count(step)):
            for p in net.parameters():
                p.grad = None
            before = picture(net, optimizer, rng=False)
            kl[0] = 1.0
            train(net, optimizer, 1000 + step)
            kl[0] = 0.0
            assert optimizer.last.action is Action.REJECT
            after = picture(net, optimizer, rng=False)
            if not isinstance(inner, torch.optim.LBFGS):
                for part in ("parameters", "state", "state objects", "groups", "attributes"):
                    assert after[part] == before[part], part
        train(bare_net, bare, step)
        train(net, optimizer, step)
        assert optimizer.last.action is Action.COMMIT
    for p, q in zip(net.parameters(), bare_net.parameters(), strict=True):
        assert bits(p) == bits(q)
    assert bits(list(inner.state.values())) == bits(list(bare.state.values()))


@pytest.mark.parametrize(("name", "dtype"), [case for case in CASES if case[1] in ("fp32", "bf16")])
def test_shrinks_hold_the_budget(name, dtype):
    """Interpolation lands within the budget, on the weights as they are rounded."""
    if not runs_bare(name, dtype):
        pytest.skip(f"bare {name} does not run in {dtype}")
    net, inner = build(name, dtype)
    start: list[torch.Tensor] = []

    def moved() -> float:
        return sum(float((p - q).float().square().sum()) for p, q in zip(net.parameters(), start, strict=True))

    optimizer = STEPOptimizer(inner, kl=moved, budget=math.inf)
    for step in range(4):
        start[:] = [p.detach().clone() for p in net.parameters()]
        train(net, optimizer, step)
        optimizer.set_budget(max(optimizer.last.candidate.mean / 9, 1e-12))
        if step:
            assert optimizer.last.action in (Action.SHRINK, Action.COMMIT, Action.UNCHANGED)
        with torch.no_grad():
            assert moved() == optimizer.last.accepted.mean <= optimizer.last.budget.mean


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_8bit_state_is_restored_bit_for_bit(name):
    """uint8 moments, their absmax and quantization maps come back; keys made by a rejected first step are gone."""
    net, inner = build(name, "fp32")
    kl = [1.0]
    optimizer = STEPOptimizer(inner, kl=lambda: kl[0], budget=0.5, controller=Gate())
    train(net, optimizer, 0)
    assert optimizer.last.action is Action.REJECT
    assert not inner.state
    kl[0] = 0.0
    train(net, optimizer, 0)
    state = inner.state[net.table.weight]
    assert state["state1"].dtype is torch.uint8
    before, objects = bits(dict(state)), {key: id(value) for key, value in state.items()}
    kl[0] = 1.0
    train(net, optimizer, 1)
    assert bits(dict(inner.state[net.table.weight])) == before
    assert {key: id(value) for key, value in inner.state[net.table.weight].items() if torch.is_tensor(value)} == {
        key: objects[key] for key, value in state.items() if torch.is_tensor(value)
    }
    other = inner.state[net.out.weight]
    assert other["qmap1"] is state["qmap1"]  # shared between parameters, and still shared


def test_shrink_equals_a_step_at_a_smaller_learning_rate():
    """For Adam-like optimizers theta_t + alpha (candidate - theta_t) is the step at lr * alpha, moments included."""
    net, inner = build("AdamW", "fp32")
    twin, small = build("AdamW", "fp32")
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = STEPOptimizer(
        inner,
        kl=lambda: sum(float((p - q).square().sum()) for p, q in zip(net.parameters(), start, strict=True)),
        budget=1e-4,
    )
    train(net, optimizer, 0)
    for group in small.param_groups:
        group["lr"] *= optimizer.last.alpha
    train(twin, small, 0)
    for p, q, s in zip(map(Tensor.detach, net.parameters()), map(Tensor.detach, twin.parameters()), start, strict=True):
        rounding = 2 * torch.finfo(torch.float32).eps * s.abs()  # both weights are rounded once or twice
        assert ((p - q).abs() <= 1e-3 * (q - s).abs() + rounding).all()
        assert float((q - s).norm()) > 30 * float(rounding.norm())
    assert bits(list(inner.state.values())) == bits(list(small.state.values()))


def test_the_wrapper_is_an_optimizer_to_everybody():
    """Isinstance, schedulers, hooks (once), zero_grad, add_param_group, attributes, repr."""
    net, inner = build("AdamW", "fp32")
    optimizer = STEPOptimizer(inner, kl=lambda: 0.0, budget=1.0)
    assert isinstance(optimizer, torch.optim.Optimizer)
    calls: list[str] = []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append("global"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda opt, *_: calls.append(str(opt.last.action)))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    train(net, optimizer, 0)
    handle.remove()
    scheduler.step()
    assert calls == ["pre", "commit", "global"]
    assert inner.param_groups[0]["lr"] == pytest.approx(1e-4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(inner.param_groups) == 2
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.defaults is inner.defaults
    assert not optimizer._step_supports_amp_scaling
    with pytest.raises(AttributeError, match="no_such"):
        _ = optimizer.no_such
    assert "AdamW" in repr(optimizer)


def test_copies_and_pickles_work_and_ask_for_a_kl_closure():
    """A deep copy has the inner optimizer and the counters; its KL closure has to be bound to the copy's model."""
    net, inner = build("AdamW", "fp32")
    optimizer = STEPOptimizer(inner, kl=lambda: 0.0, budget=1.0, controller=Interpolate(tol=0.1))
    train(net, optimizer, 0)
    twin = copy.deepcopy(optimizer)
    assert twin.summary() == optimizer.summary()
    assert twin.controller.tol == 0.1
    twin.param_groups[0]["params"][0].grad = torch.zeros(80, 64)
    with pytest.raises(RuntimeError, match="bind"):
        twin.step()
    twin.bind(lambda: 0.0)
    twin.step()


def test_grad_scaler_skips_and_unscales_as_with_a_bare_optimizer():
    """GradScaler must not hand its scale to the wrapper, where no kernel reads it."""
    results = []
    for wrapped in (False, True):
        net, inner = build("AdamW", "fp32")
        optimizer = STEPOptimizer(inner, kl=lambda: 0.0, budget=math.inf) if wrapped else inner
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(net(torch.arange(8)).square().mean()).backward()
            if step == 1:
                net.out.weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        results.append([bits(p) for p in net.parameters()] + [scaler.get_scale()])
    assert results[0] == results[1]
