"""GradScaler over optimizers whose fused kernels unscale and skip by themselves: STEP sees finished gradients only."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from step_optim import Action, STEPOptimizer
from tests.hosts.common import check_host, everything

FUSED = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}
OBSERVATIONS = torch.linspace(-1, 1, 20).reshape(5, 4)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    return model(x).square().mean()


@pytest.mark.parametrize("unscale", ["by the user", "by the scaler"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_optimizers_under_a_grad_scaler(name, unscale):
    """Bits, scale and skipped steps are the bare run's, though there the kernel unscales; a skipped step is none."""

    def loop(wrap: Any) -> dict[str, Any]:
        model = nn.Linear(4, 3)
        optimizer = wrap(FUSED[name](model.parameters()), lambda: model(OBSERVATIONS))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        norms = []
        # Not in the first step: there, bare fused SGD keeps momentum that its kernel has not written.
        for step in range(7):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step) * (math.inf if step in (2, 5) else 1.0)).backward()
            if unscale == "by the user":
                scaler.unscale_(optimizer)
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            scaler.step(optimizer)
            scaler.update()
        return everything(model, optimizer, norms=norms, scaler=scaler.state_dict())

    measured, _, _ = check_host(loop)
    assert [record.step for record in measured.records] == list(range(5))
    assert {record.action for record in measured.records} == {Action.COMMIT}


def pair(name: str) -> tuple[tuple[nn.Module, Optimizer], tuple[nn.Module, STEPOptimizer]]:
    """A bare fused optimizer with its model, and their wrapped twins."""
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    wrapped = STEPOptimizer(FUSED[name](twin.parameters()), kl=lambda: 0.0, budget=math.inf)
    return (model, FUSED[name](model.parameters())), (twin, wrapped)


@pytest.mark.parametrize("name", FUSED)
def test_a_scale_and_an_overflow_that_a_user_sets_reach_the_kernel(name):
    """`grad_scale` and `found_inf` set on the wrapper divide gradients, and skip the update, as on the bare one."""
    runs = pair(name)
    for model, optimizer in runs:
        for step in range(4):
            optimizer.zero_grad()
            (8 * loss_of(model, step)).backward()
            optimizer.grad_scale = torch.tensor(8.0)
            optimizer.found_inf = torch.tensor(float(step == 2))
            before = copy.deepcopy(model.state_dict())
            optimizer.step()
            assert torch.equal(before["weight"], model.weight) == (step == 2)
            del optimizer.grad_scale, optimizer.found_inf
    bare, wrapped = (everything(model, optimizer) for model, optimizer in runs)
    assert wrapped == bare
    assert not {"grad_scale", "found_inf"} & (vars(runs[1][1]).keys() | vars(runs[1][1].optimizer).keys())


@pytest.mark.parametrize("name", FUSED)
def test_a_scale_that_a_user_has_set_multiplies_the_scalers(name):
    """PyTorch takes the product of both; the scaler divides by its own, the kernel by the user's."""
    runs = pair(name)
    for model, optimizer in runs:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(8 * loss_of(model, step)).backward()
            optimizer.grad_scale = torch.tensor(8.0)
            scaler.step(optimizer)
            scaler.update()
    bare, wrapped = (everything(model, optimizer) for model, optimizer in runs)
    assert {k for k in bare if bare[k] != wrapped[k]} <= {"gradients"}  # the scaler has written its half into .grad


def test_names_that_the_inner_optimizer_does_not_have_are_missing():
    """Before anybody sets them, they are no attributes of the wrapper either; deleted, they are gone from both."""
    _, (_, optimizer) = pair("AdamW")
    assert not hasattr(optimizer, "grad_scale")
    with pytest.raises(AttributeError, match="found_inf"):
        _ = optimizer.found_inf
    optimizer.grad_scale = torch.tensor(4.0)
    assert optimizer.optimizer.grad_scale is optimizer.grad_scale
    del optimizer.grad_scale
    assert not hasattr(optimizer.optimizer, "grad_scale")
