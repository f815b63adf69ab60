"""STEP inside accelerate: the bare run's bits, audits outside its autocast, budgets that hold, exact resumes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from step_optim import Action, Budget, Gate, PolicyKL, TokenKL
from tests.hosts.common import bare, everything
from tests.hosts.text import (
    SteppedText,
    check_text_host,
    counters,
    forget_accelerator,
    innermost,
    policy,
    seeded,
    texts,
)
from tests.models import nudge, ragged_control


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Leave no shared state to other tests."""
    yield
    forget_accelerator()


@dataclass
class Loop:
    """A training loop with accelerate, as its documentation writes it."""

    accelerator: Accelerator
    model: Any
    optimizer: Any
    scheduler: Any
    seen: list[Any] = field(default_factory=list)

    def train(self, batches: Any) -> None:
        for batch in batches:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.seen.append(self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.seen.append(loss.detach())

    def result(self, **more: Any) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        more["scaler"] = None if scaler is None else scaler.state_dict()
        return everything(
            self.model, innermost(self.optimizer), seen=self.seen, lr=self.scheduler.get_last_lr(), **more
        )


def start(
    wrap: Any,
    *,
    seed: int = 0,
    accumulation: int = 2,
    scaler: bool = False,
    make: Callable[[Any], Optimizer] = lambda p: torch.optim.AdamW(p, lr=3e-2),
    **options: Any,
) -> Loop:
    def build() -> Loop:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)
        if scaler:  # accelerate makes one for fp16, which it refuses on a CPU
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        model = policy(seed)
        optimizer = wrap(make(model.parameters()), model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return Loop(accelerator, *accelerator.prepare(model.train(), optimizer, scheduler))

    return seeded(build, seed)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of two texts."""
    rows = texts(2 * count)
    return [collate(rows[i : i + 2]) for i in range(0, 2 * count, 2)]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_with_accumulation_clipping_and_a_schedule(precision):
    """One audit for each optimizer step, the short last group included, read in fp32 also where training is in bf16."""

    def loop(wrap):
        host = start(wrap, mixed_precision=precision)
        host.train(host.accelerator.prepare(DataLoader(texts(10), batch_size=2, shuffle=True, collate_fn=collate)))
        return host.result()

    measured, _, _ = check_text_host(loop)
    assert len(measured.records) == 3  # 5 batches in groups of 2


@pytest.mark.parametrize("order", ["TokenKL first", "prepare first"])
def test_audits_do_not_run_in_the_autocast_inside_of_forward(order):
    """Unchanged weights read 0, changed ones what they read without accelerate; training goes on in bf16."""
    forget_accelerator()
    model = policy().eval()
    twin = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    kl = TokenKL(model, ragged_control()) if order == "TokenKL first" else None
    prepared = accelerator.prepare(model).eval()
    kl, alone = kl or TokenKL(prepared, ragged_control()), TokenKL(twin, ragged_control())
    prompt = ragged_control().prompts[0][None]
    logits = prepared(prompt).logits
    assert kl.readout == alone.readout
    for measure in (kl, alone):
        measure.anchor()
        assert measure().mean == 0
    for module in (model, twin):
        nudge(module, 1e-2)
    assert kl() == alone()
    assert kl().mean > 0
    for module in (model, twin):  # and back: what was cast in an audit is not kept
        module.load_state_dict(policy().state_dict())
    assert torch.equal(prepared(prompt).logits, logits)
    assert not torch.equal(twin(prompt).logits, logits)


def test_a_policy_kl_that_knows_its_model_does_not_run_in_that_autocast_either():
    """With `model=`, what the function calls reads what it reads without accelerate."""
    forget_accelerator()
    model = policy()
    twin = copy.deepcopy(model)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    prompt = ragged_control().prompts[0][None]
    kl, alone = (PolicyKL(lambda m=m: m(prompt).logits[0], model=m) for m in (prepared, twin))
    for measure, module in ((kl, model), (alone, twin)):
        measure.anchor()
        nudge(module, 1e-2)
    assert kl() == alone()
    assert kl().mean > 0


def test_a_forward_that_was_replaced_after_prepare_is_the_policy_that_is_audited():
    """Whoever patches `model.forward` once more is not passed over to get rid of autocast."""
    forget_accelerator()
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(policy())
    inner, calls = model.forward, []

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return inner(*args, **kwargs)

    kl = TokenKL(model, ragged_control())
    model.forward = patched
    kl.anchor()
    assert calls
    assert model.forward is patched


def test_an_audit_that_fails_leaves_accelerates_forward_in_place():
    """Also then, training goes on in mixed precision."""
    forget_accelerator()
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(policy())
    kl = TokenKL(model, ragged_control())
    forward = model.forward

    def fail(*_: Any) -> None:
        raise MemoryError

    with model.model.register_forward_pre_hook(fail), pytest.raises(MemoryError):
        kl.anchor()
    assert model.forward is forward


def test_accelerate_knows_overflows_and_step_knows_rejections():
    """A rejection leaves the bits as they were and `step_was_skipped` set, on the wrapper; the scheduler goes on."""
    held = SteppedText(0.0, Gate)
    host = start(held)
    before = host.result()
    host.train(batches(2))
    assert host.optimizer.optimizer.step_was_skipped
    assert not host.accelerator.optimizer_step_was_skipped  # accelerate asks its scaler alone
    after = host.result()
    assert all(before[part] == after[part] for part in ("parameters", "buffers", "state"))
    assert host.scheduler.get_last_lr() == [pytest.approx(3e-2 * 0.9)]
    assert held.actions() == {Action.REJECT}


def test_steps_that_a_grad_scaler_skips_are_skipped_under_step_too():
    """An overflow in the second of four steps: no proposal, no record, the same scale and bits as bare."""

    def loop(wrap):
        host = start(wrap, scaler=True, accumulation=1, mixed_precision="bf16")
        skipped = []
        for i, batch in enumerate(batches(4)):
            overflow = torch.tensor(math.inf if i == 1 else 1.0)
            hook = host.model.lm_head.weight.register_hook(overflow.__mul__)
            host.train([batch])
            hook.remove()
            skipped.append(host.optimizer.step_was_skipped)
        assert skipped == [False, True, False, False]
        return host.result(skipped=skipped)

    measured, _, _ = check_text_host(loop)
    assert len(measured.records) == 3


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_resumes_to_the_bit(tmp_path, precision):
    """save_state after three of six steps, load_state into other weights: decisions, drift and counters go on."""
    measured = SteppedText(math.inf)
    start(measured, mixed_precision=precision).train(batches(12))
    budget = Budget(mean=measured.records[0].candidate.mean / 4, reference=measured.records[-1].reference_drift.mean)

    whole = SteppedText(budget)
    uninterrupted = start(whole, mixed_precision=precision)
    uninterrupted.train(batches(12))
    assert whole.actions() >= {Action.SHRINK}

    first = start(SteppedText(budget), mixed_precision=precision)
    first.train(batches(12)[:6])
    first.accelerator.save_state(str(tmp_path))
    second = SteppedText(budget)
    resumed = start(second, seed=1, mixed_precision=precision)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(batches(12)[6:])
    assert second.story() == whole.story()[3:]
    resumed.seen = first.seen + resumed.seen
    assert resumed.result() == uninterrupted.result()
    assert counters(resumed.optimizer) == counters(uninterrupted.optimizer)


def test_accelerate_switches_schedule_free_optimizers_through_step():
    """train() and eval() arrive at the inner optimizer: evaluation sees the averaged weights, as with the bare one."""
    schedulefree = pytest.importorskip("schedulefree")

    def loop(wrap):
        host = start(wrap, accumulation=1, make=lambda p: schedulefree.AdamWScheduleFree(p, lr=3e-2))
        evaluations = []
        for batch in batches(4):
            host.optimizer.train()
            host.train([batch])
            for switch in (host.optimizer.train, host.optimizer.eval):
                switch()
                with torch.no_grad():
                    evaluations.append(host.model.eval()(**batch).loss)
            host.model.train()
        if wrap is bare:
            assert all(a != b for a, b in zip(evaluations[2::2], evaluations[3::2], strict=True))  # the modes differ
        return host.result(evaluations=evaluations)

    check_text_host(loop)
