"""A device that computes behind the host's back is waited for once a step, and the steps are the same.

A CPU stands in for it: its results are treated as if a look at them were a wait.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from step_optim import Budget, Gate, Interpolate, Project, STEPOptimizer, TokenKL
from step_optim.snapshot import tensors as stores
from tests.models import nudge, ragged_control, tiny_llama
from tests.strategies import bits


@pytest.fixture(params=[False, True], ids=["at once", "behind"])
def behind(request):
    """Whether the CPU plays an accelerator."""
    with mock.patch.object(stores, "SYNCHRONOUS", () if request.param else ("cpu", "meta")):
        yield request.param


def make(controller: object, budget: Budget, *, frozen_head: bool = False) -> tuple[nn.Module, STEPOptimizer]:
    """A model and its optimizer."""
    model = tiny_llama()
    if frozen_head:
        model.lm_head.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    kl = TokenKL(model, ragged_control(), noise_floor=False)
    return model, STEPOptimizer(torch.optim.AdamW(trained, lr=0.02), kl=kl, budget=budget, controller=controller)


def push(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Gradients."""
    for p in model.parameters():
        p.grad = (
            scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) if p.requires_grad else None
        )


def history(controller: object, budget: Budget) -> list:
    """Six steps; somebody else edits weights before the third, `.data` of a frozen one before the fifth."""
    model, optimizer = make(controller, budget, frozen_head=True)
    seen = []
    for step in range(6):
        if step == 2:
            with torch.no_grad():
                model.model.norm.weight.data.mul_(1.5)
        if step == 4:
            model.lm_head.weight.data.mul_(1.1)
        push(model, step)
        optimizer.step()
        record = optimizer.last
        seen.append(
            (
                record.action,
                record.candidate,
                record.accepted,
                (record.reference_drift, record.reference_renewed),
                record.update_norm,
                [trial.alpha for trial in record.trials],
                [bits(p) for p in model.parameters()],
            )
        )
    return seen


@pytest.mark.parametrize(
    ("controller", "budget"),
    [
        (Interpolate, Budget(mean=math.inf)),
        (Interpolate, Budget(mean=1e-3)),
        (Interpolate, Budget(mean=1e-3, reference=5e-3)),
        (Gate, Budget(mean=1e-3)),
        (lambda: Gate(patience=1), Budget(mean=1e-3, slices=1e-3)),
        (lambda: Project(steps=1), Budget(mean=1e-3)),
    ],
)
def test_the_steps_are_the_same_and_edits_are_noticed(controller, budget) -> None:
    """Decisions, figures and weights are those of a device that can be looked at, bit for bit."""
    with mock.patch.object(stores, "SYNCHRONOUS", ()):
        late = history(controller(), budget)
    early = history(controller(), budget)
    for step, (a, b) in enumerate(zip(late, early, strict=True)):
        assert a[:4] == b[:4]
        assert a[3][1] == (step in (2, 4))
        assert a[4] == pytest.approx(b[4], rel=1e-12)
        assert a[5:] == b[5:]


def test_nothing_moved(behind) -> None:
    """A step that moves nothing is unchanged; if somebody else moved weights before it, the reference is taken anew."""
    model, optimizer = make(Interpolate(), Budget(mean=1e-3))
    push(model, 0)
    optimizer.step()
    assert not optimizer.last.reference_renewed
    push(model, 0)
    optimizer.param_groups[0]["lr"] = 0.0
    nudge(model, 0.1)
    optimizer.step()
    assert optimizer.last.action == "unchanged"
    assert optimizer.last.reference_renewed
    push(model, 1, 1e-9)
    optimizer.param_groups[0]["lr"] = 0.02
    optimizer.step()
    assert not optimizer.last.reference_renewed
    assert optimizer.last.accepted.mean <= 1e-3
    kl = optimizer._run.kl
    assert kl().mean == 0.0  # the reference is the policy that stands


def test_an_update_that_is_not_finite(behind) -> None:
    """It is rejected, whoever looks first: the audit or the norm."""
    model, optimizer = make(Interpolate(), Budget(mean=1e-3))
    push(model, 0)
    optimizer.step()
    before = [bits(p) for p in model.parameters()]
    push(model, 1)
    next(iter(model.parameters())).grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.last.action == "reject"
    assert math.isnan(optimizer.last.candidate.mean)
    assert [bits(p) for p in model.parameters()] == before


@pytest.mark.parametrize("edit", [False, True])
def test_a_loss_closure_and_a_window_know_at_the_start(behind, edit) -> None:
    """A forward inside the step may move buffers: the reference is made sure of before it."""
    model, optimizer = make(Interpolate(), Budget(mean=1e-3))
    for round_ in range(2):
        if edit:
            nudge(model, 0.1, seed=round_)
        push(model, round_)
        if round_:
            optimizer.step(lambda: torch.zeros(()))
        else:
            with optimizer.window():
                optimizer.step()
                optimizer.step()
        assert optimizer.last.accepted.mean <= 1e-3
        assert optimizer._run.kl().mean == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_waits_for_the_device_at_the_decision_only() -> None:
    """In a committed step the first call of ours that synchronises is the KL's: the device has nothing left to do."""
    model = tiny_llama(hidden=64, layers=4).cuda()
    kl = TokenKL(model, ragged_control("cuda"))
    optimizer = STEPOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), kl, budget=Budget(mean=1.0))
    for seed in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, device="cuda")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert optimizer.last.action == "commit", seed
    places = [Path(w.filename) for w in caught if "synchroniz" in str(w.message)]
    ours = [place.name for place in places if place.parent.name == "step_optim"]
    assert ours
    assert ours[0] == "logit_kl.py", ours
    assert len(ours) <= 5, ours  # the KL, then what is there already: buffers, the norm, the doubt


def test_a_stale_reference_that_comes_out_with_an_update_that_is_not_finite(behind) -> None:
    """The step is rejected, and the next one takes the reference anew: it does not measure the outside edit."""
    model, optimizer = make(Interpolate(), Budget(mean=1e-3))
    push(model, 0, 1e-3)
    optimizer.step()
    for p in model.parameters():
        p.data.add_(0.1)  # no version counts it: only the device can tell
    push(model, 1)
    next(iter(model.parameters())).grad[0, 0] = math.inf
    optimizer.step()
    assert optimizer.last.action == "reject"
    assert optimizer.last.reference_renewed
    optimizer.param_groups[0]["lr"] = 1e-6
    push(model, 2)
    optimizer.step()
    assert optimizer.last.action == "commit"
    assert optimizer.last.candidate.mean < 1e-4
    assert optimizer._run.kl().mean == 0.0
