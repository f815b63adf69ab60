"""Lightning's Trainer with automatic optimisation: fits, schedules, checkpoints and resumes as it does bare."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from step_optim import Action, Budget, Gate
from tests.hosts.common import Stepped, bare, check_host, run
from tests.hosts.lightning_loops import OBSERVATIONS, Module, Wrap, data, fitting, loader, result, trainer_for
from tests.strategies import bits

pytestmark = [
    # About the number of cores and the size of the data set, not about training.
    pytest.mark.filterwarnings("ignore:The '?.*'? does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

# -- automatic optimisation: step(closure), the closure does forward and backward ------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": "bf16-mixed"},
    ],
    ids=lambda options: "+".join(map(str, options.values())) or "plain",
)
def test_automatic_optimisation(options):
    """One audit for each optimizer step, whatever the Trainer does to batches, gradients and precision."""
    precision = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(options.get("precision"), torch.float32)
    observations = OBSERVATIONS.to(precision)

    class Typed(Module):
        rate = 0.05

        def configure_optimizers(self):
            return self.wrap(self.inner(), lambda: self.policy(observations))

    measured, _, _ = check_host(fitting(Typed, **options))
    assert len(measured.records) == (6 if "accumulate_grad_batches" in options else 10)


class Scheduled(Module):
    """With a scheduler of Lightning's choosing when to step it."""

    def __init__(self, wrap: Wrap, schedule: Callable[[Optimizer], Any], **config: Any) -> None:
        super().__init__(wrap)
        self.schedule, self.config = schedule, config

    def training_step(self, batch: Any, index: int) -> Any:
        self.seen.append([dict(group, params=None) for group in self.trainer.optimizers[0].param_groups])
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), **self.config}}


SCHEDULES: dict[str, Callable[[Wrap], Module]] = {
    "step": lambda wrap: Scheduled(wrap, lambda o: lr_scheduler.ExponentialLR(o, 0.8), interval="step"),
    "epoch": lambda wrap: Scheduled(wrap, lambda o: lr_scheduler.StepLR(o, 1, 0.5), interval="epoch"),
    "one cycle": lambda wrap: Scheduled(
        wrap, lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20), interval="step"
    ),
    "plateau": lambda wrap: Scheduled(
        wrap,
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
        interval="step",
        frequency=2,
        monitor="loss",
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_of_a_trainer(name):
    """The learning rate moves as in the bare run, also where every step is rejected."""
    loop = fitting(SCHEDULES[name])
    check_host(loop)
    rejected = Stepped(0.0, Gate)
    path = run(loop, bare)["seen"]
    assert len({repr(values) for values in path}) > 1
    if name != "plateau":  # its schedule follows the losses, which are others
        assert run(loop, rejected)["seen"] == path
        assert rejected.actions() == {Action.REJECT}


def test_an_optimizer_that_calls_the_closure_many_times():
    """LBFGS evaluates the loss within one step: Lightning's closure runs as often as bare, and it is one candidate."""

    class Smooth(Module):
        def __init__(self, wrap):
            super().__init__(wrap)
            self.policy = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))

        def inner(self):
            return torch.optim.LBFGS(self.policy.parameters(), lr=0.5, max_iter=4)

    measured, _, _ = check_host(fitting(Smooth, epochs=1))
    assert len(measured.records) == 5


def test_hooks_around_the_step():
    """Lightning's own hooks see the gradients, clip them, replace the step, and are called as often as bare."""

    class Hooked(Module):
        def on_before_optimizer_step(self, optimizer):
            self.seen.append(("before", [None if p.grad is None else p.grad.clone() for p in self.policy.parameters()]))

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            warm = (self.trainer.global_step + 1) / 4
            for group in optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, warm)
            self.seen.append(("closure", optimizer.step(closure=optimizer_closure)))

        def on_before_zero_grad(self, optimizer):
            self.seen.append(("zero", isinstance(optimizer, Optimizer)))

    check_host(fitting(Hooked))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # on purpose
def test_a_skipped_batch_is_no_movement():
    """A training step that returns None skips the update: nothing moves, nothing is audited or rejected."""

    class Skipping(Module):
        def training_step(self, batch, index):
            return None if index == 1 else self.loss(batch)

    measured, _, _ = check_host(fitting(Skipping))
    assert [r.action for r in measured.records].count(Action.UNCHANGED) in (0, 2)


@pytest.mark.parametrize("name", ["weight averaging", "stochastic weight averaging", "accumulation"])
def test_callbacks_that_touch_weights(name):
    """Averages swapped in for validation and back, or at the end, and accumulation that changes on the way."""
    from lightning.pytorch.callbacks import (
        EMAWeightAveraging,
        GradientAccumulationScheduler,
        StochasticWeightAveraging,
    )

    class Validated(Module):
        def validation_step(self, batch, index):
            self.seen.append(float(self.loss(batch)))

    def loop(wrap):
        module = Validated(wrap)
        callback = {
            "weight averaging": lambda: EMAWeightAveraging(decay=0.8, use_buffers=True),
            "stochastic weight averaging": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
            "accumulation": lambda: GradientAccumulationScheduler(scheduling={0: 1, 1: 2}),
        }[name]()
        trainer = trainer_for(3, callbacks=[callback], num_sanity_val_steps=0)
        trainer.fit(module, loader(), loader(shuffle=False))
        return result(module, trainer)

    check_host(loop)


def test_an_error_inside_the_closure_leaves_the_weights():
    """A training step that raises half-way through training leaves the policy of the step before."""
    torch.manual_seed(0)
    kept: list[Any] = []

    class Failing(Module):
        def training_step(self, batch, index):
            loss = self.loss(batch)
            if self.trainer.global_step == 3:
                kept.append(bits(dict(self.policy.named_parameters())))
                raise ArithmeticError("no loss today")
            return loss

    stepped = Stepped(Budget(mean=math.inf))
    module = Failing(stepped)
    with pytest.raises(ArithmeticError, match="no loss today"):
        trainer_for().fit(module, loader())
    assert [bits(dict(module.policy.named_parameters()))] == kept
    assert stepped.records[-1].error == "ArithmeticError: no loss today"
    assert len(stepped.records) == 4


# -- checkpoint and resume -----------------------------------------------------------------------------------------


class Resumable(Module):
    """Its batches and random numbers are functions of the step: all else has to come from the checkpoint."""

    def on_train_batch_start(self, batch, index):
        torch.manual_seed(1000 + self.trainer.global_step)

    def training_step(self, batch, index):
        return self.loss(data(self.trainer.global_step))

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class ManualResumable(Resumable):
    def __init__(self, wrap):
        super().__init__(wrap)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(data(self.trainer.global_step)))
        optimizer.step()
        self.lr_schedulers().step()


# The resumed run writes beside what it resumes from; by hand, a checkpoint holds the weights after the step.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings(
    "ignore:You're resuming from a checkpoint that ended before the epoch ended"
)  # see Resumable
@pytest.mark.parametrize("kind", [Resumable, ManualResumable])
@pytest.mark.parametrize("budget", [math.inf, 1e-4])
@pytest.mark.parametrize("by", ["steps", "epochs"])
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path, kind, budget, by):
    """A ModelCheckpoint from the middle or the end of an epoch: weights, state, decisions, drift and counters go on."""
    options = {"every_n_train_steps": 3} if by == "steps" else {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    first = 3 if by == "steps" else 5

    def saving():
        saver = pl.callbacks.ModelCheckpoint(tmp_path / name, save_top_k=-1, filename="{step}", **options)
        return trainer_for(callbacks=[saver], enable_checkpointing=True)

    def whole(wrap):
        module = kind(wrap)
        trainer = saving()
        trainer.fit(module, loader(shuffle=False))
        return result(module, trainer) | {"losses": bits(module.losses[first:])}

    def resumed(wrap):
        module = kind(wrap)
        with torch.no_grad():  # another start
            for parameter in module.parameters():
                parameter.uniform_()
        trainer = saving()
        path = tmp_path / name / f"step={first}.ckpt"
        trainer.fit(module, loader(shuffle=False), ckpt_path=path, weights_only=True)
        return result(module, trainer)

    name = "bare"
    alone = run(whole, bare)
    assert run(resumed, bare) == alone
    name = "stepped"
    stepped, again = Stepped(budget), Stepped(budget)
    expected, seen = run(whole, stepped), run(resumed, again)
    assert seen == expected
    assert (expected == alone) == (budget == math.inf)
    records = [[r.to_dict() | {"seconds": None} for r in s.records] for s in (stepped, again)]
    assert records[1] == records[0][first:]
    assert len(records[0]) == 10
    assert (Action.SHRINK in again.actions()) == (budget < 1)
    left, right = stepped.optimizers[0].summary(), again.optimizers[0].summary()
    figures = ("steps", "commits", "shrinks", "rejects", "mean_alpha", "max_accepted_kl", "reference_drift")
    assert {figure: left[figure] for figure in figures} == {figure: right[figure] for figure in figures}


def test_checkpoints_are_interchangeable_with_bare_ones(tmp_path):
    """A bare Trainer's checkpoint resumes under STEP, and the other way round: same weights afterwards."""

    def start(wrap, name):
        module = Resumable(wrap)
        trainer = trainer_for(1)
        trainer.fit(module, loader(shuffle=False))
        trainer.save_checkpoint(tmp_path / name)

    def go_on(wrap, name):
        module = Resumable(wrap)
        trainer = trainer_for(2)
        trainer.fit(module, loader(shuffle=False), ckpt_path=tmp_path / name, weights_only=True)
        return result(module, trainer)

    def stepped():
        return Stepped(Budget(mean=math.inf))

    run(lambda wrap: start(wrap, "bare") or {}, bare)
    run(lambda wrap: start(wrap, "stepped") or {}, stepped())
    results = [
        run(lambda wrap, name=name: go_on(wrap, name), wrap)
        for name in ("bare", "stepped")
        for wrap in (bare, stepped())
    ]
    assert all(one == results[0] for one in results)
