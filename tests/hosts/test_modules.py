"""Gradient checkpointing, shared and reparametrised weights, dropout and BatchNorm in a wrapped run."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from step_optim import Action, ControlSet, PolicyKL, STEPOptimizer, TokenKL
from tests.hosts.common import check_host, everything
from tests.hosts.loops import OBSERVATIONS, adamw, loss_of, train
from tests.models import tiny_llama
from tests.strategies import Policy, bits

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
