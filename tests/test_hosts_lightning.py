"""Lightning's Trainer and Fabric: automatic and manual optimisation run as they do bare, and controllers act in them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from step_optim import Action, Budget, Gate, PolicyKL, STEPOptimizer
from tests.hosts import Stepped, bare, check_host, everything, run
from tests.strategies import Policy, bits

pl = pytest.importorskip("lightning.pytorch")
lightning_optimizer = pytest.importorskip("lightning.pytorch.core.optimizer")

pytestmark = [
    # About this machine's cores and this data set's size, not about training.
    pytest.mark.filterwarnings("ignore:The '?.*'? does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]
OBSERVATIONS = torch.linspace(-1, 1, 30).reshape(6, 5)
Wrap = Callable[..., Optimizer]


def data(step: int) -> tuple[Tensor, Tensor]:
    """Observations [8, 5] and actions [8], a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=generator), torch.randint(0, 4, (8,), generator=generator)


def loader(shuffle: bool = True) -> DataLoader:
    """Five batches; shuffled with the global random stream."""
    x, y = zip(*(data(step) for step in range(5)), strict=True)
    return DataLoader(TensorDataset(torch.cat(x), torch.cat(y)), batch_size=8, shuffle=shuffle)


def trainer_for(epochs: int = 2, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, enable_model_summary=False, **quiet | options)


class Module(pl.LightningModule):
    """A policy with dropout and BatchNorm under automatic optimisation; subclasses change what they are about."""

    rate = 0.02

    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.policy = Policy()
        self.wrap = wrap
        self.losses: list[float] = []
        self.seen: list[Any] = []

    def loss(self, batch: tuple[Tensor, Tensor], policy: nn.Module | None = None) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy((policy or self.policy)(x).float(), y)
        self.losses.append(float(loss.detach()))
        return loss

    def training_step(self, batch: Any, index: int) -> Any:
        return self.loss(batch)

    def inner(self) -> Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=self.rate)

    def configure_optimizers(self) -> Any:
        return self.wrap(self.inner(), lambda: self.policy(OBSERVATIONS))


def result(module: Module, trainer: Any) -> dict[str, Any]:
    assert trainer.state.finished
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return everything(
        module,
        trainer.optimizers,
        losses=module.losses,
        seen=module.seen,
        steps=trainer.global_step,
        schedules=[{k: v for k, v in state.items() if not callable(v)} for state in schedules],
    )


def fitting(build: Callable[[Wrap], Module], **options: Any) -> Callable[[Wrap], dict[str, Any]]:
    """Make the training loop that fits a module."""

    def loop(wrap: Wrap) -> dict[str, Any]:
        module = build(wrap)
        trainer = trainer_for(**options)
        trainer.fit(module, loader())
        return result(module, trainer)

    return loop


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
    """A training step that returns None skips the update: its step moves nothing, and is neither audited nor rejected."""

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


# The resumed run writes beside what it resumes from. By hand, a checkpoint holds the weights after the step, as it should.
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


# -- manual optimisation: everything through the proxy ---------------------------------------------------------------


class Manual(Module):
    """The optimizer is Lightning's proxy, an instance of STEPOptimizer that never ran its constructor."""

    def __init__(self, wrap: Wrap) -> None:
        super().__init__(wrap)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> Any:
        optimizer = self.optimizers()
        assert isinstance(optimizer, lightning_optimizer.LightningOptimizer)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()


def test_manual_optimisation():
    """zero_grad, manual_backward, clipping and step, as in the bare run."""
    measured, _, _ = check_host(fitting(Manual))
    assert len(measured.records) == 10


def test_manual_optimisation_with_a_closure():
    """step(closure) through the proxy returns the closure's loss."""

    class WithClosure(Manual):
        def training_step(self, batch, index):
            optimizer = self.optimizers()

            def closure():
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            self.seen.append(optimizer.step(closure=closure).detach())

    check_host(fitting(WithClosure))


def test_manual_accumulation_and_schedules():
    """Several backward passes for one step, the scheduler stepped by hand."""

    class Accumulating(Manual):
        def training_step(self, batch, index):
            optimizer, schedule = self.optimizers(), self.lr_schedulers()
            self.manual_backward(self.loss(batch) / 2)
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                self.seen.append(optimizer.param_groups[0]["lr"])

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.8)]

    measured, _, _ = check_host(fitting(Accumulating))
    assert len(measured.records) == 4


class Proxied(Manual):
    """Calls ``use(proxy, step, backward)`` at each training step."""

    def __init__(self, wrap: Wrap, use: Callable[..., None]) -> None:
        super().__init__(wrap)
        self.use = use

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.policy.norm.eval()  # the observer of a window starts at its first step, after the first forward

    def training_step(self, batch: Any, index: int) -> Any:
        optimizer = self.optimizers()

        def backward() -> None:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))

        self.use(optimizer, self.trainer.global_step, backward)


def proxied(use: Callable[..., None], budget: float = math.inf, **options: Any) -> tuple[Module, Stepped]:
    """Fit five steps of a `Proxied` module."""
    torch.manual_seed(0)
    stepped = Stepped(budget, **options)
    module = Proxied(stepped, use)
    trainer_for(1).fit(module, loader())
    return module, stepped


def test_budgets_set_through_the_proxy_hold():
    """set_budget and an assignment to ``budget`` reach the optimizer that steps."""

    def use(optimizer, step, backward):
        if step == 1:
            optimizer.set_budget(Budget(mean=1e-5))
        if step == 3:
            optimizer.set_budget(math.inf)
        backward()
        optimizer.step()
        assert optimizer.last.budget.mean == (1e-5 if step in (1, 2) else math.inf)
        assert optimizer.budget.at(step, ()).mean == optimizer.last.budget.mean

    _, stepped = proxied(use)
    assert [r.action for r in stepped.records] == [
        Action.COMMIT,
        Action.SHRINK,
        Action.SHRINK,
        Action.COMMIT,
        Action.COMMIT,
    ]


def test_notes_made_through_the_proxy_reach_one_record_each():
    """Each note is in the record of its own step, and in no other."""

    def use(optimizer, step, backward):
        optimizer.note(reward=float(step), batch=step)
        if step % 2:
            optimizer.note(odd=True)
        backward()
        optimizer.step()

    _, stepped = proxied(use)
    assert [(r.reward, dict(r.notes)) for r in stepped.records] == [
        (0.0, {"batch": 0}),
        (1.0, {"batch": 1, "odd": True}),
        (2.0, {"batch": 2}),
        (3.0, {"batch": 3, "odd": True}),
        (4.0, {"batch": 4}),
    ]


def test_last_and_summary_read_through_the_proxy_are_current():
    """So are step_was_skipped, state and groups."""

    def use(optimizer, step, backward):
        inner = optimizer.optimizer
        assert isinstance(inner, STEPOptimizer)
        assert (optimizer.last is None) == (step == 0)
        backward()
        optimizer.step()
        assert optimizer.last.step == step
        assert optimizer.last is inner.last
        assert optimizer.summary() == inner.summary()
        assert optimizer.summary()["steps"] == step + 1
        assert optimizer.step_was_skipped
        assert optimizer.state is inner.state
        assert optimizer.param_groups is inner.param_groups

    proxied(use, 0.0, controller=Gate)


@pytest.mark.parametrize("budget", [math.inf, 1e-4])
def test_a_window_opened_through_the_proxy_is_one_candidate(budget):
    """Three proxy steps in it make one record; opening it does not depend on who steps."""

    def use(optimizer, step, backward):
        index = 0 if optimizer.last is None else optimizer.last.step + 1
        with optimizer.window():
            for _ in range(3):
                backward()
                optimizer.step()
                assert (optimizer.last.step if optimizer.last else -1) == index - 1
        assert optimizer.last.step == index
        assert optimizer.last.action is (Action.COMMIT if budget == math.inf else Action.SHRINK)
        assert optimizer.last.accepted.mean <= budget

    module, stepped = proxied(use, budget)
    assert len(stepped.records) == 5
    assert len(module.losses) == 15


def test_windows_in_manual_optimisation():
    """A run of windows is the bare run at an infinite budget; a rejected one takes back all of its steps."""

    class Windowed(Manual):
        def on_train_batch_start(self, batch, index):
            self.policy.norm.eval()  # as above

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            stepped = isinstance(optimizer, STEPOptimizer)
            before = bits(list(self.policy.parameters()))
            with optimizer.window() if stepped else nullcontext():
                for part in range(3):
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(data(3 * index + part)))
                    optimizer.step()
            if stepped and optimizer.last.action is Action.REJECT:
                assert bits(list(self.policy.parameters())) == before

    measured, _, _ = check_host(fitting(Windowed, epochs=1))
    assert len(measured.records) == 5


def test_an_error_in_a_window_opened_through_the_proxy():
    """The weights are those from before it, and the next step is an ordinary one."""

    def use(optimizer, step, backward):
        before = bits(optimizer.param_groups[0]["params"])
        with pytest.raises(ArithmeticError), optimizer.window():
            backward()
            optimizer.step()
            raise ArithmeticError
        assert bits(optimizer.param_groups[0]["params"]) == before
        assert optimizer.last.error == "ArithmeticError: "
        backward()
        optimizer.step()
        assert optimizer.last.action is Action.COMMIT

    _, stepped = proxied(use)
    assert [r.success for r in stepped.records][:4] == [False, True, False, True]


def test_what_is_refused_inside_a_window_is_refused_through_the_proxy():
    """The proxy knows that a window is open."""

    def use(optimizer, step, backward):
        other = PolicyKL(lambda: modules[0].policy(OBSERVATIONS))
        with optimizer.window():
            with pytest.raises(RuntimeError, match="inside a window"):
                optimizer.refresh()
            with pytest.raises(RuntimeError, match="inside a window"):
                optimizer.bind(other)
            with pytest.raises(RuntimeError, match="inside a window"), optimizer.window():
                pass
            with pytest.raises(RuntimeError, match="inside a window"):
                optimizer.step(kl=other)
            backward()
            optimizer.step()

    torch.manual_seed(0)
    stepped = Stepped(math.inf)
    modules = [Proxied(stepped, use)]
    trainer_for(1).fit(modules[0], loader())
    assert [record.success for record in stepped.records] == [True] * 5


def test_a_kl_closure_given_through_the_proxy():
    """step(kl=...), window(kl=...) and bind() measure with the closure that was given."""
    used: list[str] = []

    class Named(PolicyKL):
        def __init__(self, name, fn):
            super().__init__(fn)
            self.name = name

        def audit(self):
            used.append(self.name)
            return super().audit()

    def use(optimizer, step, backward):
        module = modules[0]
        backward()
        used.clear()
        other = Named("other", lambda: module.policy(OBSERVATIONS))
        if step == 0:
            optimizer.step(kl=other)
            assert used == ["other"]
        elif step == 1:
            with optimizer.window(kl=other):
                optimizer.step()
            assert used == ["other"]
        elif step == 2:
            optimizer.bind(other)
            optimizer.step()
            assert used == ["other"]
        else:
            optimizer.step()
            assert used == ["other"]

    torch.manual_seed(0)
    modules = [Proxied(Stepped(math.inf), use)]
    trainer_for(1).fit(modules[0], loader())
    assert used == ["other"]


def test_state_saved_and_loaded_through_the_proxy():
    """The proxy's state dict has the counters; loading it turns the optimizer that steps back."""
    saved: dict[str, Any] = {}

    def use(optimizer, step, backward):
        backward()
        optimizer.step()
        if step == 1:
            assert set(optimizer.state_dict()) == {"state", "param_groups", "step_optim"}
            saved.update(copy.deepcopy(optimizer.state_dict()))
        if step == 3:
            optimizer.load_state_dict(saved)
            assert optimizer.state_dict()["step_optim"]["step"] == 2
            assert bits(optimizer.state_dict()) == bits(saved)

    _, stepped = proxied(use, 1e-4)
    assert [r.step for r in stepped.records] == [0, 1, 2, 3, 2]


def test_an_outside_edit_is_noticed_through_the_proxy():
    """refresh() through the proxy, and edits without it, make the next step measure from the weights as they are."""

    def use(optimizer, step, backward):
        parameters = optimizer.param_groups[0]["params"]
        with torch.no_grad():
            for parameter in parameters:
                parameter.data.mul_(1.1)
        if step % 2:
            optimizer.refresh(restart_drift=True)
        backward()
        optimizer.step()
        if step % 2:
            assert optimizer.last.reference_drift.mean == optimizer.last.accepted.mean

    proxied(use, 1e-4)  # the observer compares every record


# -- several optimizers --------------------------------------------------------------------------------------------


class Two(Manual):
    """An actor and a critic with an optimizer each; both are audited on their own outputs."""

    def __init__(self, wrap: Wrap, toggled: str) -> None:
        super().__init__(wrap)
        self.other = Policy()
        self.toggled = toggled

    def training_step(self, batch: Any, index: int) -> Any:
        for optimizer, network in zip(self.optimizers(), (self.policy, self.other), strict=True):
            if self.toggled == "toggle_model":
                region = optimizer.toggle_model()
            elif self.toggled == "toggled_optimizer":
                region = self.toggled_optimizer(optimizer)
            else:
                region = nullcontext()
            with region:
                optimizer.zero_grad()
                # The first's output enters the second's loss: without toggling its gradients would be left over.
                x, y = batch
                logits = network(x) + 0.1 * self.policy(x)
                loss = nn.functional.cross_entropy(logits, y)
                self.losses.append(float(loss.detach()))
                self.manual_backward(loss)
                self.seen.append([p.grad is None for p in self.parameters()])
                self.seen.append([p.requires_grad for p in self.parameters()])
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            self.wrap(torch.optim.AdamW(self.policy.parameters(), lr=0.02), lambda: self.policy(OBSERVATIONS)),
            self.wrap(torch.optim.SGD(self.other.parameters(), lr=0.1, momentum=0.9), lambda: self.other(OBSERVATIONS)),
        ]


@pytest.mark.parametrize("toggled", ["not", "toggle_model", "toggled_optimizer"])
def test_two_optimizers(toggled):
    """Each has its own reference, budget and log; toggling requires_grad disturbs neither."""
    measured, shrunk, _ = check_host(fitting(lambda wrap: Two(wrap, toggled)))
    assert [len(o.optimizers) for o in (measured, shrunk)] == [2, 2]
    for optimizer in measured.optimizers:
        assert optimizer.summary()["steps"] == 10


def test_two_optimizers_over_one_policy():
    """What one of them moved is no movement of the other: the reference is taken anew."""

    class Split(Manual):
        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                with optimizer.toggle_model():
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    optimizer.step()

        def configure_optimizers(self):
            parts = (self.policy.body, self.policy.head)
            return [
                self.wrap(torch.optim.AdamW(part.parameters(), lr=0.02), lambda: self.policy(OBSERVATIONS))
                for part in parts
            ]

    check_host(fitting(Split))


# -- Fabric --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(tmp_path, precision):
    """Fabric's proxy, its precision, clipping and checkpoints; windows and notes through the proxy."""
    fabric_module = pytest.importorskip("lightning.fabric")

    def loop(wrap):
        fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision=precision)
        model = Policy()
        optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=0.02), lambda: model(OBSERVATIONS))
        module, proxy = fabric.setup(model, optimizer)
        losses = []
        for step in range(6):
            x, y = data(step)
            proxy.zero_grad()
            loss = nn.functional.cross_entropy(module(x).float(), y)
            fabric.backward(loss)
            losses.append(float(fabric.clip_gradients(module, proxy, max_norm=0.5)))
            if isinstance(proxy, STEPOptimizer):
                proxy.note(reward=float(step))
                with proxy.window():
                    proxy.step()
                assert proxy.last.reward == step
                assert proxy.last.step == step
            else:
                proxy.step()
            losses.append(float(loss.detach()))
        fabric.save(tmp_path / "fabric.ckpt", {"model": module, "optimizer": proxy})
        state = {"model": module, "optimizer": proxy}
        kept = bits(proxy.state_dict())
        with torch.no_grad():
            model.scalar.zero_()
        fabric.load(tmp_path / "fabric.ckpt", state, weights_only=True)
        assert bits(proxy.state_dict()) == kept
        return everything(model, optimizer, losses=losses)

    check_host(loop)
