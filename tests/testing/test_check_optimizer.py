"""`check_optimizer` tells good optimizers from bad ones."""

from __future__ import annotations

import pytest
import torch

from step_optim import Gate, Interpolate, STEPOptimizer
from step_optim.snapshot import state
from step_optim.snapshot import weights as snapshot
from step_optim.snapshot.known import known_copies, why_recomputed
from step_optim.testing import Kind, check_optimizer, train_step


class Plain(torch.optim.Optimizer):
    """SGD, for others to spoil."""

    def __init__(self, params, lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})

    def rate(self) -> float:
        return 1.0

    def after(self, p: torch.Tensor) -> None:
        """Do more than SGD."""

    @torch.no_grad()
    def step(self, closure=None, **more):
        rate = self.rate()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * rate)
                self.after(p)


class InSlots(Plain):
    """Counts its steps where no rollback looks: in an object without a dictionary."""

    class Counter:
        """One number."""

        __slots__ = ("value",)

    def __init__(self, params) -> None:
        super().__init__(params)
        self.counter = self.Counter()
        self.counter.value = 0

    def rate(self) -> float:
        self.counter.value += 1
        return 1 / self.counter.value


class InAClosure(Plain):
    """Counts its steps in a variable of a function."""

    def __init__(self, params) -> None:
        super().__init__(params)
        count = 0

        def rate() -> float:
            nonlocal count
            count += 1
            return 1 / count

        self.decay = rate

    def rate(self) -> float:
        return self.decay()


class Average(Plain):
    """Pulls the weights to their running average, which it keeps in its state."""

    def after(self, p: torch.Tensor) -> None:
        average = self.state[p].setdefault("average", p.detach().clone())
        average.lerp_(p, 0.5)
        p.copy_(average)


class FromSums(Plain):
    """Keeps no weights, but computes them from the first ones and the sum of gradients."""

    def after(self, p: torch.Tensor) -> None:
        state = self.state[p]
        if not state:
            state.update(start=(p + 0.5 * p.grad).square(), sign=(p + 0.5 * p.grad).sign(), sum=torch.zeros_like(p))
        state["sum"].add_(p.grad.abs() * p.grad)
        p.copy_(state["start"].sqrt() * state["sign"] - state["sum"].abs().sqrt() * state["sum"].sign())


class NoGroups:
    """Trains, but says to nobody what."""

    def __init__(self, parameters) -> None:
        self.parameters = parameters

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.parameters:
            p.sub_(p.grad, alpha=0.5)


class Elsewhere(Plain):
    """Moves the weights when gradients are reset."""

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.9)
        super().zero_grad(set_to_none)


class Lazy(Plain):
    """Moves nothing."""

    def rate(self) -> float:
        return 0.0


class Broken(Plain):
    """Raises in its second step."""

    def after(self, p: torch.Tensor) -> None:
        self.state[p]["seen"] = self.state[p].get("seen", 0) + 1
        if self.state[p]["seen"] == 2:
            raise ArithmeticError("no second step")


class Forgetful(Plain):
    """Does not find its state where it saves it; that is its own affair, not the wrapper's."""

    def after(self, p: torch.Tensor) -> None:
        if self.state[p]:
            p.add_(self.state[p]["last"], alpha=0.1)
        self.state[p]["last"] = p.grad.clone()

    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class Strict(Plain):
    """Loads nothing but what it saved itself."""

    def load_state_dict(self, state_dict):
        if set(state_dict) != {"state", "param_groups"}:
            raise KeyError("unknown part")
        super().load_state_dict(state_dict)


class Masters(Plain):
    """Trains float32 copies, and rounds them."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                master = self.state[p].setdefault("master", p.float())
                p.copy_(master.sub_(p.grad.float(), alpha=group["lr"]))


class Backward(Plain):
    """Has what LOMO has: a step inside the backward pass."""

    def fused_backward(self, loss, lr) -> None:
        loss.backward()


def test_a_good_optimizer_is_exact_in_everything():
    """All findings of the verdict, and its text."""
    verdict = check_optimizer(Plain)
    assert verdict.exact
    assert verdict.verdict is Kind.EXACT
    assert all((verdict.runs, verdict.accepted, verdict.rollback, verdict.transparent, verdict.resumes))
    assert all((verdict.resumes_bare, verdict.interpolates))
    assert verdict.sticks == pytest.approx(1, abs=1e-5)
    assert verdict.half_sticks == pytest.approx(1, abs=1e-5)
    assert str(verdict).startswith("Plain, float32: exact\n")


@pytest.mark.parametrize(
    ("factory", "finding", "words"),
    [
        (InSlots, "rollback", "counter.value differs"),
        (InAClosure, "rollback", "decay.count differs"),
        (Elsewhere, "rollback", "weights move outside step()"),
        (Broken, "runs", "ArithmeticError: no second step"),
        (Lazy, "runs", "no step moves a weight"),
        (Backward, "accepted", "inside the backward pass"),
        (NoGroups, "accepted", "it has no param_groups"),
        (lambda parameters: object(), "runs", "AttributeError"),
        (Strict, "resumes", "its checkpoint in the bare optimizer: KeyError: 'unknown part'"),
    ],
)
def test_what_is_wrong_is_found_and_named(factory, finding, words):
    """State that no rollback reaches, movement outside of step(), failures: refuse, and why."""
    verdict = check_optimizer(factory)
    assert verdict.verdict is Kind.REFUSE
    assert not verdict.exact
    assert not getattr(verdict, finding)
    assert words in getattr(verdict, finding).why
    assert words in str(verdict)
    order = ["runs", "accepted", "rollback"]
    tried = order[: order.index(finding)] if finding in order else order
    assert all(getattr(verdict, name) for name in tried)
    assert all(getattr(verdict, name).why == "not tried" for name in order[len(tried) + 1 :])


def test_copies_of_the_weights_are_found_and_moved_along_once_they_are_known():
    """The stick test names the state key; with it, half a step stays half a step."""
    verdict = check_optimizer(Average)
    assert verdict.verdict is Kind.NEEDS_PARAM_LIKE
    assert verdict.needs == ("average",)
    assert verdict.sticks < 0.6
    assert "shrink needs param_like=('average',)" in verdict.headline
    told = check_optimizer(Average, param_like="average")
    assert told.verdict is Kind.EXACT
    assert told.headline == "exact; shrink moves average along"
    assert told.half_sticks > 0.99


def test_float32_masters_of_bfloat16_weights_are_copies():
    """Nothing at all of a movement stays away without them, and all of it with them."""
    assert check_optimizer(Masters, dtype=torch.bfloat16).needs == ("master",)
    told = check_optimizer(Masters, dtype=torch.bfloat16, param_like="master")
    assert told.interpolates
    assert told.sticks < 0.1 < 0.99 < told.half_sticks


def test_weights_that_are_computed_anew_cannot_be_shrunk():
    """No state that could be moved along helps: the verdict says so."""
    verdict = check_optimizer(FromSums)
    assert verdict.verdict is Kind.DO_NOT_SHRINK
    assert verdict.exact
    assert "the optimizer's state brings the rest back" in str(verdict)


def test_an_optimizer_that_cannot_be_saved_is_told_from_a_wrapper_that_cannot():
    """What differs from the uninterrupted bare run is the optimizer's fault if the bare resumed run differs, too."""
    verdict = check_optimizer(Forgetful)
    assert verdict.exact
    assert not verdict.resumes_bare
    assert verdict.resumes_bare.why in str(verdict)


def test_checks_leave_the_random_streams_alone():
    """A user calls it in the middle of something."""
    before = torch.get_rng_state()
    check_optimizer(torch.optim.SGD)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_training_step_of_ones_own_is_used():
    """What the step needs besides a gradient comes from the user."""

    class Needy(Plain):
        def step(self, *, scale):
            for group in self.param_groups:
                group["scale"] = scale
            super().step()

    def step_with_scale(optimizer, loss):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step(scale=2.0)

    assert "scale" in check_optimizer(Needy, train_step=train_step).runs.why
    assert check_optimizer(Needy, train_step=step_with_scale).verdict is Kind.EXACT


def forget_state(monkeypatch):
    monkeypatch.setattr(state.OptimizerState, "restore_optimizer", lambda self: None)


def forget_gradients(monkeypatch):
    monkeypatch.setattr(state.Gradients, "restore", lambda self: None)


def save_more(monkeypatch):
    monkeypatch.setattr(STEPOptimizer, "_own_state", lambda self: {"made": Plain})


def step_aside(monkeypatch):
    go = snapshot.Weights.go

    def aside(self, alpha):
        go(self, alpha)
        for live in self.live:
            live.add_(1e-3 * (0 < alpha < 1))

    monkeypatch.setattr(snapshot.Weights, "go", aside)


@pytest.mark.parametrize(
    ("breaking", "finding"),
    [
        (forget_state, "rollback"),
        (forget_gradients, "rollback"),
        (save_more, "resumes"),
        (step_aside, "interpolates"),
    ],
)
def test_a_broken_wrapper_would_be_found(monkeypatch, breaking, finding):
    """Each check goes red if the part of the library that it is about does not do its work."""

    class Writing(torch.optim.Adam):
        """Adam that writes into gradients, too."""

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.mul_(0.5)
            super().step(closure)

    assert getattr(check_optimizer(Writing), finding)
    breaking(monkeypatch)
    assert not getattr(check_optimizer(Writing), finding)


def test_known_optimizers_without_a_line_refuse_to_interpolate():
    """The error says why, and what to use instead; a plain gate is taken."""
    import pytorch_optimizer

    def make():
        return pytorch_optimizer.FTRL([torch.nn.Parameter(torch.ones(3))], lr=0.1)

    with pytest.raises(ValueError, match=r"FTRL computes the weights anew.*Use Gate\(\)"):
        STEPOptimizer(make(), kl=lambda: 0.0, budget=1.0, controller=Interpolate())
    STEPOptimizer(make(), kl=lambda: 0.0, budget=1.0, controller=Gate())


@pytest.mark.parametrize(
    ("library", "copies", "recomputed"),
    [("pytorch_optimizer", ("slow_params",), True), ("torch_optimizer", ("slow_param",), False), ("mine", (), False)],
)
def test_two_classes_of_one_name_are_two_optimizers(library, copies, recomputed):
    """What is known of one library's Lookahead or FTRL says nothing about another's."""

    def make(name):
        cls = type(name, (Plain,), {"__module__": f"{library}.optim"})
        return type("Mine", (cls,), {})([torch.nn.Parameter(torch.ones(3))])

    assert known_copies(make("Lookahead")) == copies
    assert (why_recomputed(make("FTRL")) is not None) is recomputed
