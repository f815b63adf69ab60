"""Mixed precision, accumulation, clipping and averaged weights around a wrapped optimizer."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from step_optim import Action, Gate, PolicyKL, STEPOptimizer
from tests.hosts.common import Stepped, check_host, everything, run
from tests.hosts.loops import OBSERVATIONS, adamw, data, loss_of, momentum, train
from tests.strategies import Policy, bits

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
