"""torch's own machinery around a training loop: each works wrapped as it works bare, and a controller acts in it."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.nn.utils import parametrizations, parametrize
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from step_optim import Action, Budget, ControlSet, Gate, Interpolate, PolicyKL, STEPOptimizer, TokenKL
from tests.hosts import Stepped, check_host, everything, run
from tests.models import tiny_llama
from tests.strategies import Bigram, Policy, bits, picture

OBSERVATIONS = torch.linspace(-1, 1, 30).reshape(6, 5)
INF = Budget(mean=math.inf)


class Net(nn.Module):
    """Dropout and BatchNorm; unlike in `Policy` every parameter is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def data(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    """Observations [rows, 5] and actions [rows], a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 5, generator=generator), torch.randint(0, 4, (rows,), generator=generator)


def loss_of(model: Callable[[Tensor], Tensor], step: int) -> Tensor:
    x, y = data(step)
    return nn.functional.cross_entropy(model(x).float(), y)


def adamw(model: nn.Module, lr: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def momentum(model: nn.Module, lr: float = 0.2) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """The plainest loop; ``after`` runs at the end of each step."""
    losses = []
    for step in steps:
        model.train()
        optimizer.zero_grad()
        loss = loss_of(model if forward is None else forward, step)
        loss.backward()
        optimizer.step()
        after(step)
        losses.append(float(loss.detach()))
    return losses


# -- learning-rate schedulers --------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 3, 5], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.7)],
        milestones=[3],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.3, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.7)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.001, anneal_epochs=4),
}
# SequentialLR calls its members' deprecated step(epoch) itself.
scheduled = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step\\(\\)`:UserWarning")
with_momentum = pytest.mark.parametrize("inner", [adamw, momentum])


def advance(schedule: Any, step: int) -> None:
    """Step a scheduler as its kind wants; the metric of a plateau does not depend on the training."""
    if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
        schedule.step(1.0 if step % 3 else 0.5)
    else:
        schedule.step()


def scheduled_values(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What schedulers own, of the inner optimizer's groups."""
    inner = getattr(optimizer, "optimizer", optimizer)
    names = ("lr", "momentum", "betas", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
    return [bits({name: group[name] for name in names if name in group}) for group in inner.param_groups]


def scheduled_loop(name: str, inner: Callable[..., torch.optim.Optimizer], steps: int = 8) -> Callable[..., Any]:
    def loop(wrap: Callable[..., torch.optim.Optimizer]) -> dict[str, Any]:
        model = Policy()
        optimizer = wrap(inner(model), lambda: model(OBSERVATIONS))
        schedule = SCHEDULERS[name](optimizer)
        path = []

        def after(step: int) -> None:
            advance(schedule, step)
            path.append(scheduled_values(optimizer))

        losses = train(model, optimizer, range(steps), after=after)
        kept = {k: v for k, v in schedule.state_dict().items() if not k.startswith("_s")}  # not nested schedulers
        return everything(model, optimizer, losses=losses, path=path, schedule=kept)

    return loop


def test_no_scheduler_of_torch_is_left_out():
    """A scheduler that torch adds fails here until it has a row above."""
    found = {
        name
        for name, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} <= SCHEDULERS.keys()
    assert len(SCHEDULERS) >= 16


@scheduled
@with_momentum
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_the_inner_learning_rate_as_in_a_bare_run(name, inner):
    """Built on the wrapper; the schedule is the bare one's through commits, shrinks and rejections."""
    loop = scheduled_loop(name, inner)
    check_host(loop)
    expected = run(loop, lambda optimizer, policy: optimizer)["path"]
    assert len({repr(values) for values in expected}) > 1  # the schedule schedules
    for controller, budget in ((Interpolate, 1e-4), (Gate, 0.0)):
        held = Stepped(budget, controller)
        assert run(loop, held)["path"] == expected
        assert held.actions() & {Action.SHRINK, Action.REJECT}


@scheduled
@with_momentum
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("budget", [0.0, math.inf])
def test_a_window_leaves_the_schedulers_keys_to_the_scheduler(name, inner, budget):
    """Whether the window is rolled back or committed, lr, momentum and betas end as in a bare run."""

    def values(wrapped: bool) -> list[Any]:
        torch.manual_seed(0)
        model = Policy()
        optimizer = inner(model)
        if wrapped:
            kl = PolicyKL(lambda: model(OBSERVATIONS))
            optimizer = STEPOptimizer(optimizer, kl=kl, budget=budget, controller=Gate())
        schedule = SCHEDULERS[name](optimizer)
        path = []
        for window in range(3):
            steps = range(3 * window, 3 * window + 3)
            if wrapped:
                with optimizer.window():
                    train(model, optimizer, steps, after=lambda step: advance(schedule, step))
                assert optimizer.last.action is (Action.COMMIT if budget else Action.REJECT)
            else:
                train(model, optimizer, steps, after=lambda step: advance(schedule, step))
            path.append(scheduled_values(optimizer))
        return path

    assert values(wrapped=True) == values(wrapped=False)


@scheduled
@with_momentum
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_resumes_from_its_state_dict(name, inner):
    """Optimizer and scheduler are saved in the middle; decisions, weights and the schedule go on as if they had not."""
    budget = Budget(mean=1e-4)

    def start() -> tuple[nn.Module, STEPOptimizer, Any]:
        torch.manual_seed(0)
        model = Policy()
        optimizer = STEPOptimizer(inner(model), kl=PolicyKL(lambda: model(OBSERVATIONS)), budget=budget)
        return model, optimizer, SCHEDULERS[name](optimizer)

    def go_on(model: nn.Module, optimizer: STEPOptimizer, schedule: Any, steps: range) -> list[Any]:
        seen = []

        def after(step: int) -> None:
            advance(schedule, step)
            seen.append((optimizer.last.to_dict() | {"seconds": None}, scheduled_values(optimizer)))

        train(model, optimizer, steps, after=after)
        return seen

    whole = start()
    expected = go_on(*whole, range(8))
    model, optimizer, schedule = start()
    go_on(model, optimizer, schedule, range(4))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict(), torch.get_rng_state()], file)
    # Some schedulers keep classes of their own in their state: that is torch's business, not the wrapper's.
    weights, state, plan, rng = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    model, optimizer, schedule = start()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    schedule.load_state_dict(plan)
    torch.set_rng_state(rng)
    assert go_on(model, optimizer, schedule, range(4, 8)) == expected[4:]
    assert everything(model, optimizer) == everything(*whole[:2])
    assert {record["action"] for record, _ in expected} & {"shrink", "reject"}


def test_a_tensor_learning_rate_is_scheduled_through_rejections():
    """Schedulers fill a tensor lr in place: the rollback neither undoes that nor replaces the tensor."""

    def loop(wrap):
        model = Policy()
        rate = torch.tensor(0.02)
        optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=rate, foreach=False), lambda: model(OBSERVATIONS))
        schedule = lr_scheduler.ExponentialLR(optimizer, gamma=0.7)
        path = []

        def after(step):
            schedule.step()
            path.append(float(rate))

        train(model, optimizer, range(6), after=after)
        assert optimizer.param_groups[0]["lr"] is rate
        return everything(model, optimizer, path=path)

    check_host(loop)
    assert run(loop, Stepped(0.0, Gate))["path"] == run(loop, lambda optimizer, _: optimizer)["path"]


# -- mixed precision, accumulation, clipping -----------------------------------------------------------------------


def test_grad_scaler_on_cpu():
    """Scaling, unscaling, clipping and skipped steps are those of the bare run; so is the scale's own history."""

    def loop(wrap):
        model = Policy()
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        history = []
        for step in range(9):
            model.train()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, step)
            scaler.scale(loss * (math.inf if step in (2, 6) else 1.0)).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            history.append((float(loss.detach()), float(norm), scaler.get_scale()))
        assert history[2][2] < history[1][2]
        return everything(model, optimizer, history=history, scaler=scaler.state_dict())

    measured, _, _ = check_host(loop)
    assert len(measured.records) == 7  # a step that the scaler skips is none


def test_a_grad_scaler_grows_through_rejections():
    """A rejected step is no overflow: the scale does what it does without STEP."""

    def loop(wrap):
        model = Policy()
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        return everything(model, optimizer, scaler=scaler.state_dict())

    held = Stepped(0.0, Gate)
    assert run(loop, held)["scaler"] == run(loop, lambda optimizer, _: optimizer)["scaler"]
    assert held.actions() == {Action.REJECT}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("around", ["forward", "step", "window"])
def test_autocast(around, dtype):
    """Whether a region ends before the step, holds it, or holds a window: the audit reads fp32 and today's weights."""

    def loop(wrap):
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4))
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        losses = []

        def forward(step):
            optimizer.zero_grad()
            # In the bare run a second forward in one region would read casts of the weights before the step.
            torch.clear_autocast_cache()
            loss = loss_of(model, step)
            losses.append(float(loss.detach()))
            return loss

        for step in range(6):
            if around == "forward":
                with torch.autocast("cpu", dtype):
                    loss = forward(step)
                loss.backward()
                optimizer.step()
            elif around == "step":
                with torch.autocast("cpu", dtype):
                    forward(step).backward()
                    optimizer.step()
            else:
                window = optimizer.window() if isinstance(optimizer, STEPOptimizer) else nullcontext()
                with torch.autocast("cpu", dtype), window:
                    for part in range(2):
                        forward(2 * step + part).backward()
                        optimizer.step()
        return everything(model, optimizer, losses=losses)

    measured, _, _ = check_host(loop)
    assert len(measured.records) == 6


def test_gradient_accumulation_and_clipping():
    """Several backward passes and a clipped norm make one step: one audit, one decision."""

    def loop(wrap):
        model = Policy()
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        history = []
        for step in range(12):
            model.train()
            loss = loss_of(model, step) / 3
            loss.backward()
            history.append(float(loss.detach()))
            if step % 3 == 2:
                history.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        return everything(model, optimizer, history=history)

    measured, _, _ = check_host(loop)
    assert len(measured.records) == 4


# -- averages of the weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_models(kind):
    """The average is taken over what was committed; update_bn and SWALR are as in the bare run."""

    def loop(wrap):
        model = Policy()
        optimizer = wrap(momentum(model), lambda: model(OBSERVATIONS))
        average = (
            AveragedModel(model)
            if kind == "swa"
            else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        )
        schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)

        def after(step):
            average.update_parameters(model)
            schedule.step()

        losses = train(model, optimizer, range(6), after=after)
        update_bn([data(step)[0] for step in range(3)], average)
        return everything(model, optimizer, losses=losses, average=average.state_dict())

    check_host(loop)


def test_an_average_over_rejected_steps_is_the_start():
    """AveragedModel sees committed weights alone."""
    torch.manual_seed(0)
    model = Policy()
    optimizer = STEPOptimizer(adamw(model), kl=PolicyKL(lambda: model(OBSERVATIONS)), budget=0.0, controller=Gate())
    average = AveragedModel(model, avg_fn=lambda old, new, count: new)
    start = bits(list(average.module.parameters()))
    train(model, optimizer, range(3), after=lambda step: average.update_parameters(model))
    assert optimizer.summary()["rejects"] == 3
    assert bits(list(average.module.parameters())) == start


@pytest.mark.parametrize("way", ["copy_", "data", "rebind", "load_state_dict", "swap_tensors"])
def test_ema_weights_swapped_in_and_out(way):
    """An evaluation with averaged weights between steps is no movement, and no stale reference if they stay."""

    def put(model: nn.Module, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            if way == "load_state_dict":
                model.load_state_dict(values)
                return
            for name, parameter in model.named_parameters():
                if way == "copy_":
                    parameter.copy_(values[name])
                elif way == "data":
                    parameter.data.copy_(values[name])
                elif way == "rebind":
                    parameter.data = values[name].clone()

    def loop(wrap):
        model = Policy()
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        seen = []

        def after(step):
            average.update_parameters(model)
            if way == "swap_tensors":  # the same objects hold other tensors meanwhile
                pairs = list(zip(model.parameters(), average.module.parameters(), strict=True))
                for mine, other in pairs:
                    mine.data, other.data = other.data, mine.data
            else:
                kept = copy.deepcopy(model.state_dict())
                put(model, copy.deepcopy(average.module.state_dict()))
            model.eval()
            seen.append(float(loss_of(model, 99).detach()))
            if step % 3 == 2:
                return  # training goes on from the average
            if way == "swap_tensors":
                for mine, other in pairs:
                    mine.data, other.data = other.data, mine.data
            else:
                put(model, kept)

        losses = train(model, optimizer, range(7), after=after)
        return everything(model, optimizer, losses=losses, seen=seen)

    check_host(loop)


# -- distributed checkpoint in one process -------------------------------------------------------------------------

single_process = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized")


def fresh(seed: int, budget: Budget | float = INF, **options: Any) -> tuple[Net, STEPOptimizer]:
    torch.manual_seed(seed)
    model = Net()
    kl = PolicyKL(lambda: model(OBSERVATIONS))
    return model, STEPOptimizer(adamw(model), kl=kl, budget=budget, **options)


def strip(state: dict[str, Any]) -> Any:
    """A flattened optimizer state without the order of its entries."""
    return {name: bits(value) for name, value in state["state"].items()}, [
        bits(dict(sorted(group.items()))) for group in state["param_groups"]
    ]


def test_dcp_state_dicts_are_those_of_a_bare_optimizer():
    """get_optimizer_state_dict names parameters, drops the extra key, and is the same with and without STEP."""

    def loop(wrap):
        model = Net()
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        train(model, optimizer, range(3))
        state = get_optimizer_state_dict(model, optimizer)
        assert set(state) == {"state", "param_groups"}
        assert state["state"].keys() == (dict(model.named_parameters()).keys() if optimizer.state else set())
        return everything(model, optimizer, flat=strip(state))

    check_host(loop)


@pytest.mark.parametrize("controller", [Gate, Interpolate])
@pytest.mark.parametrize("budget", [math.inf, 0.0])
def test_dcp_dummy_steps_make_real_state_without_an_audit(budget, controller):
    """torch.distributed.checkpoint steps with zero gradients and lr 0 to create state; no budget may undo that."""
    calls = 0
    torch.manual_seed(0)
    model = Net()

    class Counted(PolicyKL):
        def audit(self):
            nonlocal calls
            calls += 1
            return super().audit()

    optimizer = STEPOptimizer(
        adamw(model), kl=Counted(lambda: model(OBSERVATIONS)), budget=budget, controller=controller()
    )
    before = bits(list(model.parameters()))
    state = get_optimizer_state_dict(model, optimizer)
    assert calls == 0
    assert bits(list(model.parameters())) == before
    assert optimizer.last.action is Action.UNCHANGED
    assert set(state["state"]["head.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert len(optimizer.optimizer.state) == len(list(model.parameters()))
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert all(p.grad is None for p in model.parameters())


def test_dcp_dummy_steps_need_no_kl_closure():
    """A checkpoint may be loaded before `bind`: a step that moves nothing has nothing to measure, any other has."""
    torch.manual_seed(0)
    model = Net()
    optimizer = STEPOptimizer(adamw(model), budget=1.0)
    state = get_optimizer_state_dict(model, optimizer)
    assert set(state["state"]["head.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(RuntimeError, match="bind"):
        train(model, optimizer, range(1))
    optimizer.bind(PolicyKL(lambda: model(OBSERVATIONS)))
    train(model, optimizer, range(1))
    assert optimizer.last.action is Action.COMMIT


def record_of(optimizer: STEPOptimizer, whole: bool) -> dict[str, Any]:
    """The latest record without times; or the part that does not depend on counters and pi_ref."""
    plain = optimizer.last.to_dict() | {"seconds": None}
    parts = plain if whole else ("action", "candidate", "accepted", "alpha", "trials", "update_norm")
    return {name: plain[name] for name in parts}


@single_process
@pytest.mark.parametrize("budget", [math.inf, 1e-4])
@pytest.mark.parametrize("whole", [True, False])
def test_dcp_save_and_load(tmp_path, budget, whole):
    """A run saved and loaded through torch.distributed.checkpoint goes on to the bit; counters need a file beside."""
    model, optimizer = fresh(0, budget)
    train(model, optimizer, range(4))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    torch.save(optimizer.state_dict()["step_optim"], tmp_path / "step_optim.pt")  # DCP drops it
    rng = torch.get_rng_state()
    expected = []
    train(model, optimizer, range(4, 8), after=lambda _: expected.append(record_of(optimizer, whole)))

    again, resumed = fresh(1, budget)
    weights, state = get_state_dict(again, resumed)
    target = {"model": weights, "optimizer": state}
    dcp.load(target, checkpoint_id=tmp_path)
    set_state_dict(again, resumed, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
    if whole:
        own = torch.load(tmp_path / "step_optim.pt", weights_only=True)
        resumed.load_state_dict(resumed.optimizer.state_dict() | {"step_optim": own})
    torch.set_rng_state(rng)
    seen = []
    train(again, resumed, range(4, 8), after=lambda _: seen.append(record_of(resumed, whole)))
    assert seen == expected
    assert everything(again, resumed) == everything(model, optimizer)
    assert ("shrink" in {plain["action"] for plain in expected}) == (budget < 1)
    if whole:
        assert resumed.summary()["steps"] == optimizer.summary()["steps"] == 8


def test_state_passes_by_keyword():
    """DCP and others call load_state_dict(state_dict=...)."""
    model, optimizer = fresh(0, 1e-3)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    _, other = fresh(0)
    other.load_state_dict(state_dict=state)
    assert bits(other.state_dict()) == bits(state)


# -- torch.compile -------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """Start and end without compiled code: graphs depend on what ran before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_as(way: str, model: nn.Module, backend: str) -> Callable[[Tensor], Tensor]:
    if way == "in place":
        model.compile(backend=backend)
        return model
    return torch.compile(model if way == "module" else model.forward, backend=backend)


compiled_ways = pytest.mark.parametrize("way", ["module", "in place", "function"])


@pytest.mark.usefixtures("compiler")
@compiled_ways
@pytest.mark.parametrize(("backend", "named"), [("eager", False), ("aot_eager", True)])
def test_a_compiled_model(way, backend, named):
    """The audit may go through compiled code, whether it is told the model or finds it."""

    def loop(wrap):
        torch._dynamo.reset()
        model = Net()
        compiled = compiled_as(way, model, backend)
        optimizer = wrap(adamw(model), lambda: compiled(OBSERVATIONS), model=model if named else None)
        losses = train(model, optimizer, range(3), forward=compiled)
        return everything(model, optimizer, losses=losses)

    check_host(loop)


@pytest.mark.usefixtures("compiler")
@compiled_ways
def test_the_audit_of_a_compiled_model_is_that_of_the_model_inside(way):
    """Dropout is off and BatchNorm in eval mode, and nothing is left behind, as without compilation."""
    torch.manual_seed(0)
    model = Net()
    compiled = compiled_as(way, model, "eager")
    train(model, adamw(model), range(2), forward=compiled)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    kl, expected = PolicyKL(lambda: compiled(OBSERVATIONS)), PolicyKL(lambda: plain(OBSERVATIONS))
    kl.anchor()
    expected.anchor()
    assert kl().mean == 0
    before = bits(dict(model.named_buffers()))
    with torch.no_grad():
        model.head.bias[0] += 0.5
        plain.head.bias[0] += 0.5
    assert kl().mean == expected().mean > 0
    assert bits(dict(model.named_buffers())) == before
    assert all(module.training for module in model.modules())
    assert {id(module) for module in model.modules()} - {id(module) for module in kl.used} <= {id(model)}


@pytest.mark.usefixtures("compiler")
@compiled_ways
def test_audits_compile_nothing(way):
    """An audit that made guards of its own would push the user's training forward over the recompilation limit."""
    torch.manual_seed(0)
    model = Net()
    compiled = compiled_as(way, model, "eager")
    train(model, adamw(model), range(1), forward=compiled)
    optimizer = STEPOptimizer(
        adamw(model), kl=PolicyKL(lambda: compiled(OBSERVATIONS)), budget=1e-4, controller=Interpolate("bisect")
    )
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    train(model, optimizer, range(3), forward=compiled)
    assert optimizer.last.audits > 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("way", ["module", "in place"])
@pytest.mark.parametrize("build", [Bigram, tiny_llama])
def test_token_kl_of_a_compiled_language_model(way, build):
    """TokenKL reads a compiled model as the plain one: the same figures, the same way to its logits."""
    torch.manual_seed(0)
    plain = build()
    model = copy.deepcopy(plain)
    compiled = compiled_as(way, model, "eager")
    control = ControlSet.from_ids([[3, 4], [5]], [[9, 10, 11], [12]], slices={"a": [0], "b": [1]})
    kl, expected = TokenKL(compiled, control), TokenKL(plain, control)
    kl.anchor()
    expected.anchor()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        with torch.no_grad():
            noise = 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(a.numel()))
            a.add_(noise)
            b.add_(noise)
    assert kl() == expected()
    assert kl().mean > 0
    assert kl.readout == expected.readout


@pytest.mark.usefixtures("compiler")
def test_a_compiled_inner_step():
    """The inner optimizer's step may be compiled; the transaction around it stays python."""

    def loop(wrap):
        torch._dynamo.reset()
        model = Net()
        inner = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, foreach=True)
        inner.step = torch.compile(inner.step, backend="eager")
        optimizer = wrap(inner, lambda: model(OBSERVATIONS))
        losses = train(model, optimizer, range(3))
        return everything(model, optimizer, losses=losses)

    check_host(loop)


# -- gradient checkpointing ----------------------------------------------------------------------------------------


class Recomputed(Policy):
    """Its body is not kept, but computed again in the backward pass, dropout included."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return checkpoint(super().forward, x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """Recomputation draws the same dropout with STEP in between; the audit recomputes nothing."""

    def loop(wrap):
        model = Recomputed()
        model.reentrant = reentrant
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        losses = train(model, optimizer, range(5))
        return everything(model, optimizer, losses=losses)

    check_host(loop)


def test_gradient_checkpointing_between_forward_and_backward():
    """A step between one graph's forward and its backward pass leaves that graph what it needs to recompute."""

    def loop(wrap):
        first, second = Recomputed(), Recomputed()
        one = wrap(adamw(first), lambda: first(OBSERVATIONS))
        two = wrap(adamw(second), lambda: second(OBSERVATIONS))
        losses = []
        for step in range(4):
            one.zero_grad()
            two.zero_grad()
            left, right = loss_of(first, step), loss_of(second, step)
            left.backward()
            one.step()
            right.backward()
            two.step()
            losses += [float(left.detach()), float(right.detach())]
        return everything(nn.ModuleList([first, second]), [one, two], losses=losses)

    check_host(loop)


CONTROL = ControlSet.from_ids([[3, 4], [5], [6, 7, 8]], [[9, 10], [11, 12, 13], [14]], slices={"a": [0], "b": [1, 2]})


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_with_gradient_checkpointing_and_tied_weights(checkpointing, tied):
    """A transformers model in training with recomputed layers: TokenKL audits it and the bare run is reproduced."""

    def go(budget: float | None) -> tuple[dict[str, Any], STEPOptimizer | None]:
        model = tiny_llama(tied=tied, layers=2)
        model.config.attention_dropout = 0.1
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if budget is not None:
            optimizer = STEPOptimizer(optimizer, kl=TokenKL(model, CONTROL), budget=budget)
        torch.manual_seed(0)
        losses = []
        for step in range(3):
            ids = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            observer = TokenKL(model, CONTROL)
            observer.anchor()
            optimizer.step()
            losses.append(float(loss.detach()))
            if budget is not None:
                assert observer() == optimizer.last.accepted
                assert optimizer.last.accepted.mean <= budget
        if tied:
            assert model.lm_head.weight is model.model.embed_tokens.weight
        return everything(model, optimizer, losses=losses, rng=torch.get_rng_state()), optimizer

    alone, _ = go(None)
    wrapped, optimizer = go(math.inf)
    assert wrapped == alone
    held = go(optimizer.last.candidate.mean / 2)[1]
    assert held.last.action is Action.SHRINK


# -- shared and reparametrised weights -----------------------------------------------------------------------------


class Tied(nn.Module):
    """One matrix reads the symbols in and the logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden + torch.softmax(self.embed(hidden), -1) @ self.embed.weight)


@pytest.mark.parametrize("kind", ["one parameter", "one storage"])
def test_tied_weights(kind):
    """A shared weight is moved once, also where two parameters look at one storage."""

    def loop(wrap):
        model = Tied()
        if kind == "one storage":
            model.head.weight = nn.Parameter(model.embed.weight.detach())
            assert model.head.weight is not model.embed.weight
            assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        losses = train(model, optimizer, range(5))
        assert bits(model.head.weight) == bits(model.embed.weight)
        return everything(model, optimizer, losses=losses)

    check_host(loop)


def parametrised(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
    for layer in (model[0], model[2]):
        getattr(parametrizations, kind)(layer)
    return model


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations(kind):
    """Weights that are computed from others; the power iteration of spectral_norm moves in training forwards alone."""

    def loop(wrap):
        model = parametrised(kind)
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        losses = train(model, optimizer, range(5))
        return everything(model, optimizer, losses=losses)

    check_host(loop)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_parametrization_cache_around_the_step_hides_no_movement(kind):
    """Inside parametrize.cached() a naive audit reads the weights from before the step, and its KL is zero."""

    def loop(wrap):
        model = parametrised(kind)
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        losses = []
        for step in range(5):
            model.train()
            with parametrize.cached():
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                optimizer.step()
            losses.append(float(loss.detach()))
        return everything(model, optimizer, losses=losses)

    measured, shrunk, _ = check_host(loop)
    assert all(record.candidate.mean > 0 for record in measured.records)
    assert all(record.accepted.mean > 0 for record in shrunk.records)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_parametrization_cache_is_left_as_it_was(kind):
    """The audit's forward has no autograd graph: cached, it would cut the user's next forward from its weights."""
    torch.manual_seed(0)
    model = parametrised(kind)
    optimizer = STEPOptimizer(adamw(model), kl=PolicyKL(lambda: model(OBSERVATIONS)), budget=math.inf)
    previous = copy.deepcopy(model)
    with parametrize.cached():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        loss_of(model, 0).backward()
    assert all(p.grad is not None and not torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    if kind == "weight_norm":  # nothing but its weights decides what it says
        with torch.no_grad():
            now, before = (policy(OBSERVATIONS).double().log_softmax(-1) for policy in (model, previous))
        kl = float((now.exp() * (now - before)).sum(-1).mean())
        assert optimizer.last.accepted.mean == pytest.approx(kl, rel=1e-3)


# -- dropout, BatchNorm --------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Every kind of noise and of running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.AlphaDropout(0.2)
        self.second, self.channels = nn.Linear(8, 8), nn.FeatureAlphaDropout(0.1)
        self.instance = nn.InstanceNorm1d(2, track_running_stats=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.rrelu(self.norm(self.first(x)), training=self.training))
        hidden = nn.functional.dropout(self.second(hidden), 0.2, self.training)
        hidden = self.instance(self.channels(hidden.unflatten(-1, (2, 4)))).flatten(-2)
        return self.head(hidden)


@pytest.mark.parametrize("named", [True, False])
def test_activation_dropout_and_running_statistics(named):
    """The audit reads eval mode and leaves noise and statistics alone, whether it is told the model or finds it."""

    def loop(wrap):
        model = Noisy()
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS), model=model if named else None)
        losses = train(model, optimizer, range(5))
        return everything(model, optimizer, losses=losses)

    check_host(loop)


def test_partly_frozen_batch_norm_stays_in_eval_mode():
    """Fine-tuning often keeps BatchNorm in eval mode inside a training model: so it is after every audit."""

    def loop(wrap):
        model = Noisy()
        optimizer = wrap(adamw(model), lambda: model(OBSERVATIONS))
        losses = []
        model.train()
        model.norm.eval()
        model.drop.eval()
        for step in range(5):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            assert model.training
            assert not model.norm.training
        return everything(model, optimizer, losses=losses)

    check_host(loop)


def test_statistics_that_move_in_a_step_without_weights():
    """At lr 0 a loss closure's forward still moves BatchNorm: the next step is measured from where that left it."""

    def loop(wrap):
        model = Policy()
        optimizer = wrap(adamw(model, lr=0.0), lambda: model(OBSERVATIONS))
        losses = []
        for step in range(6):
            model.train()
            optimizer.param_groups[0]["lr"] = 0.02 * (step % 2)

            def closure(step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            losses.append(float(optimizer.step(closure).detach()))
        return everything(model, optimizer, losses=losses)

    measured, _, _ = check_host(loop)
    assert [record.action for record in measured.records] == [Action.UNCHANGED, Action.COMMIT] * 3


# -- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("budget", [math.inf, 1e-4])
def test_a_copy_goes_on_as_the_original(way, budget):
    """Model and optimizer copied together in the middle of training: weights, decisions and counters agree."""
    model, optimizer = fresh(0, budget)
    train(model, optimizer, range(3))
    rng = torch.get_rng_state()
    if way == "deepcopy":
        twin, copied = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        twin, copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert copied.param_groups[0]["params"][0] is next(iter(twin.parameters()))
    assert copied.last == optimizer.last
    copied.bind(PolicyKL(lambda: twin(OBSERVATIONS)))
    train(model, optimizer, range(3, 6))
    torch.set_rng_state(rng)
    train(twin, copied, range(3, 6))
    assert copied.last.to_dict() | {"seconds": None} == optimizer.last.to_dict() | {"seconds": None}
    assert everything(twin, copied) == everything(model, optimizer)
    assert copied.summary()["steps"] == 6
    assert (optimizer.last.action is Action.SHRINK) == (budget < 1)


def test_a_copy_inside_a_run_shares_nothing():
    """Training the original leaves the copy as it was."""
    model, optimizer = fresh(0, 1e-3)
    train(model, optimizer, range(2))
    twin, copied = copy.deepcopy((model, optimizer))
    before = picture(twin, copied, rng=False)
    train(model, optimizer, range(2, 4))
    assert picture(twin, copied, rng=False) == before
    assert copied.summary()["steps"] == 2
