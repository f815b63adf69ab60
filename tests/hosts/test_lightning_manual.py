"""Manual optimisation, where everything goes through Lightning's proxy of the optimizer; several optimizers; Fabric."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch.core import optimizer as lightning_optimizer
from torch import nn
from torch.optim import lr_scheduler

from step_optim import Action, Budget, Gate, PolicyKL, STEPOptimizer
from tests.hosts.common import Stepped, check_host, everything
from tests.hosts.lightning_loops import OBSERVATIONS, Module, Wrap, data, fitting, loader, trainer_for
from tests.strategies import Policy, bits

pytestmark = [
    # About the number of cores and the size of the data set, not about training.
    pytest.mark.filterwarnings("ignore:The '?.*'? does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

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
