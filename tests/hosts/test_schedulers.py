"""Every learning-rate scheduler of torch moves the inner learning rate, also through windows and rejections."""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from step_optim import Action, Budget, Gate, Interpolate, PolicyKL, STEPOptimizer
from tests.hosts.common import Stepped, check_host, everything, run
from tests.hosts.loops import OBSERVATIONS, adamw, momentum, train
from tests.strategies import Policy, bits

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
