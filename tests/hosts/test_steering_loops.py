"""Steer, with the pull and without, in the loops that people write: the cap holds, gradients stay the loop's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from step_optim import Action, Budget, Gate, Steer, STEPOptimizer, TokenKL
from tests.models import ragged_control, tiny_llama

CAP = 0.01
CONTROLLERS = pytest.mark.parametrize("controller", [Steer(), Steer(pull=True)], ids=["steer", "pull"])


class Loop:
    """A tiny Llama that is taught one text, with a cap on its drift."""

    def __init__(self, inner=torch.optim.AdamW, controller=None, lr: float = 0.02, cap: float = CAP) -> None:
        self.model = tiny_llama(layers=2)
        control = ragged_control()
        control, pool = control.split(0.5)
        self.kl = TokenKL(self.model, control, pool=pool, noise_floor=False)
        self.optimizer = STEPOptimizer(
            inner(self.model.parameters(), lr=lr),
            kl=self.kl,
            budget=Budget(drift=cap),
            controller=controller or Steer(),
        )

    def loss(self, rows: slice = slice(None)) -> Tensor:
        ids = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [1, 3, 5, 2, 4], [2, 2, 1, 1, 3]])[rows]
        return self.model(input_ids=ids, labels=ids).loss

    def check(self) -> None:
        """No step beyond the cap, none rejected, and the loop was steered."""
        summary = self.optimizer.summary()
        assert summary["rejects"] == 0
        assert summary["steers"] > 0
        assert self.optimizer.last.reference_drift.mean <= CAP
        assert self.kl.drift().mean == pytest.approx(self.optimizer.last.reference_drift.mean, rel=1e-3, abs=1e-7)


def weights(loop: Loop) -> list[Tensor]:
    return [p.detach().clone() for p in loop.model.parameters()]


@CONTROLLERS
def test_under_a_grad_scaler(controller) -> None:
    """An overflow is no step; scaled gradients lead to the same decisions as plain ones."""
    scaled, plain = Loop(controller=controller), Loop(controller=controller)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step in range(8):
        scaled.optimizer.zero_grad()
        scaler.scale(scaled.loss() * (math.inf if step == 3 else 1.0)).backward()
        scaler.step(scaled.optimizer)
        scaler.update()
        if step != 3:
            plain.optimizer.zero_grad()
            plain.loss().backward()
            plain.optimizer.step()
    scaled.check()
    assert scaled.optimizer.last.step == 6
    for a, b in zip(weights(scaled), weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@CONTROLLERS
def test_with_accumulated_gradients(controller) -> None:
    """Several backward passes, one step; `.grad` is what the loop has accumulated, before and after."""
    loop = Loop(controller=controller)
    for _ in range(8):
        loop.optimizer.zero_grad()
        for rows in (slice(0, 2), slice(2, 4)):
            (0.5 * loop.loss(rows)).backward()
        own = [(p.grad, p.grad.clone()) for p in loop.model.parameters()]
        loop.optimizer.step()
        for p, (gradient, bits) in zip(loop.model.parameters(), own, strict=True):
            assert p.grad is gradient
            assert torch.equal(gradient, bits)
    loop.check()


@CONTROLLERS
@pytest.mark.parametrize("on_shrink", ["keep_state", "restore"])
def test_over_8_bit_states(controller, on_shrink) -> None:
    """Quantized moments stay what they are: a run from the checkpoint goes on to the bit."""
    controller = Steer(pull=controller.pull, on_shrink=on_shrink)

    def inner(parameters: Iterator[Tensor], lr: float) -> torch.optim.Optimizer:
        return bnb.optim.AdamW8bit(parameters, lr=lr, weight_decay=0.0, min_8bit_size=16)

    loop = Loop(inner, controller)
    for _ in range(4):
        step(loop)
    saved = copy.deepcopy(loop.model.state_dict()), copy.deepcopy(loop.optimizer.state_dict())
    for _ in range(4):
        step(loop)
    loop.check()
    other = Loop(inner, controller)
    other.model.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    for _ in range(4):
        step(other)
    assert all(torch.equal(a, b) for a, b in zip(weights(loop), weights(other), strict=True))


def step(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    loop.loss().backward()
    loop.optimizer.step()


@CONTROLLERS
def test_under_autocast(controller) -> None:
    """The forward in bfloat16, weights and audits in float32."""
    loop = Loop(controller=controller)
    for _ in range(8):
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loop.loss()
        loss.backward()
        loop.optimizer.step()
    loop.check()


@CONTROLLERS
def test_with_a_loss_closure_and_in_a_window(controller) -> None:
    """`step(closure)` returns the user's loss, without the pull; a window of such steps is one candidate."""
    loop = Loop(controller=controller)

    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        return loss

    for _ in range(6):
        with torch.no_grad():
            before = float(loop.loss())
        assert float(loop.optimizer.step(closure).detach()) == pytest.approx(before, rel=1e-5)
    for _ in range(3):
        with loop.optimizer.window():
            loop.optimizer.step(closure)
            loop.optimizer.step(closure)
    loop.check()


def test_after_a_gate_that_only_rejected() -> None:
    """The controller may be changed in the middle: a gate is stuck at the cap, and Steer goes on from there."""
    loop = Loop(controller=Gate())
    for _ in range(4):
        step(loop)
    assert loop.optimizer.last.action is Action.REJECT
    start = float(loop.loss().detach())
    rejected = loop.optimizer.summary()["rejects"]
    loop.optimizer.controller = Steer(pull=True)
    for _ in range(8):
        step(loop)
    assert loop.optimizer.summary()["rejects"] == rejected
    assert loop.optimizer.last.reference_drift.mean <= CAP
    assert float(loop.loss().detach()) < start
