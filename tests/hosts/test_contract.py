"""What torch asks of an optimizer and hosts take for granted, row by row where no other file has the row."""

from __future__ import annotations

import math
import pickle
from collections import defaultdict, deque

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from step_optim import Action, Controller, Gate, STEPOptimizer
from tests.strategies import INNER, bits, policy_problem


class Part(Controller):
    """The part alpha of every step."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def decide(self, trial):
        return trial.accept(trial.at(self.alpha))


def over_once():
    """KL closure: 0 at theta_t, over a budget of 0.5 at the candidate, within it at whatever is tried next."""
    return iter([0.0, 1.0, 0.0]).__next__


def weights(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes or [(6, 5), (4,)]]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_state_groups_and_defaults_are_never_copied():
    """FSDP2 and DeepSpeed assign into them, load_state_dict rebinds them: both ways they are the inner optimizer's."""
    parameters = weights()
    inner = torch.optim.AdamW(parameters)
    optimizer = STEPOptimizer(inner, kl=lambda: 0.0, budget=1.0)
    for name, value in [
        ("state", defaultdict(dict)),
        ("param_groups", inner.param_groups[:]),
        ("defaults", dict(inner.defaults)),
    ]:
        setattr(optimizer, name, value)
        assert getattr(inner, name) is getattr(optimizer, name) is value
    give_gradients(parameters, 0)
    optimizer.step()
    inner.load_state_dict(inner.state_dict())
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert "state" not in vars(optimizer)


def test_nothing_is_written_into_the_state_of_a_parameter():
    """Lazily initialised optimizers ask whether that is empty: after a rejected first step it is."""
    sizes = []

    class Lazy(torch.optim.Adam):
        def step(self, closure=None):
            sizes.append([len(self.state[p]) for group in self.param_groups for p in group["params"]])
            return super().step(closure)

    parameters = weights()
    optimizer = STEPOptimizer(Lazy(parameters), kl=lambda: 1.0, budget=0.5, controller=Gate())
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
        assert optimizer.last.action is Action.REJECT
    assert sizes == [[0, 0]] * 3
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_global_hooks_fire_once_a_step(kl):
    """The inner optimizer fires them, the wrapper does not; a trial is no step."""
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("after")),
    ]
    parameters = weights()
    optimizer = STEPOptimizer(torch.optim.SGD(parameters, lr=1.0), kl=lambda: kl, budget=0.5)
    give_gradients(parameters, 0)
    optimizer.step()
    for handle in handles:
        handle.remove()
    assert calls == ["before", "after"]


@pytest.mark.parametrize(("name", "times"), [("AdamW", 1), ("LBFGS", 4)])
def test_the_loss_closure_is_the_inner_steps_alone(name, times):
    """It runs as often as the inner optimizer says, with gradients on, and its loss is returned."""
    parameters = weights()
    inner = torch.optim.LBFGS(parameters, max_iter=4) if name == "LBFGS" else torch.optim.AdamW(parameters)
    optimizer = STEPOptimizer(inner, kl=lambda: 1.0, budget=0.5)
    enabled = []

    def loss():
        enabled.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        value = sum((p**4).sum() for p in parameters)
        value.backward()
        return value

    with torch.no_grad():
        assert optimizer.step(loss) > 0
    assert enabled == [True] * times


def test_further_arguments_reach_the_inner_step():
    """`step(hessian=...)`, `zero_grad(...)`, `load_state_dict(state_dict=...)`: by name, as given."""
    given = []

    class Second(torch.optim.SGD):
        def step(self, closure=None, hessian=None):
            given.append(hessian)
            return super().step(closure)

        def zero_grad(self, set_to_none=True, remember=False):
            given.append((set_to_none, remember))
            super().zero_grad(set_to_none)

    parameters = weights()
    optimizer = STEPOptimizer(Second(parameters, lr=0.1), kl=lambda: 0.0, budget=1.0)
    give_gradients(parameters, 0)
    optimizer.step(hessian="H")
    optimizer.zero_grad(set_to_none=False, remember=True)
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    assert given == ["H", (False, True)]


def test_a_checkpoint_is_the_inner_ones_and_one_more_key_of_plain_values():
    """No deque, generator, defaultdict or class of ours: weights_only loading and DCP take nothing else."""
    problem = policy_problem(0)
    optimizer = STEPOptimizer(problem.optimizer, kl=problem.kl, budget=1e-4)
    for step in range(3):
        problem.backward(step)
        optimizer.step()
    state = optimizer.state_dict()
    own = state.pop("step_optim")
    assert bits(state) == bits(problem.optimizer.state_dict())

    def check(value):
        assert type(value) in (dict, list, int, float, bool, str, type(None), torch.Tensor), type(value)
        for member in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(member)

    check(own)
    assert own["step"] == 3


def test_what_the_wrapper_adds_pickles():
    """The optimizer pickles with its controller, counters and a path for its log; state keeps no hook of ours."""
    problem = policy_problem(0)
    optimizer = STEPOptimizer(problem.optimizer, kl=lambda: 0.0, budget=1.0, controller=Gate(patience=3))
    problem.backward(0)
    optimizer.step()
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.last == optimizer.last
    assert twin.controller.patience == 3
    assert bits(list(twin.state.values())) == bits(list(optimizer.state.values()))


class Fused(torch.optim.SGD):
    """Moves the weights in a backward pass of its own, as LOMO does."""

    def fused_backward(self, loss, lr):
        """Do nothing here."""


def test_optimizers_that_step_in_the_backward_pass_are_refused():
    """There is no candidate to audit: known by LOMO's method, and by torch's own mark on the parameters."""
    with pytest.raises(ValueError, match=r"Fused moves the weights inside the backward pass"):
        STEPOptimizer(Fused(weights(), lr=0.1), kl=lambda: 0.0, budget=1.0)
    parameters = weights()
    _apply_optimizer_in_backward(torch.optim.SGD, parameters, {"lr": 0.1})
    with pytest.raises(ValueError, match="inside the backward pass"):
        STEPOptimizer(torch.optim.SGD(parameters, lr=0.1), kl=lambda: 0.0, budget=1.0)


def test_layerwise_optimizers_of_transformers_are_refused():
    """GaLore's layerwise dummy is known by its class."""
    dummy = transformers.trainer_pt_utils.LayerWiseDummyOptimizer(optimizer_dict={}, lr=1e-3)
    with pytest.raises(ValueError, match="LayerWiseDummyOptimizer"):
        STEPOptimizer(dummy, kl=lambda: 0.0, budget=1.0)


def test_deques_sets_and_generators_in_an_optimizer_are_rolled_back():
    """Plain attributes of any kind come back as they were, the same objects, in the same order."""

    class Odd(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.recent, self.seen, self.rng = deque([1, 2], maxlen=3), {"a"}, torch.Generator().manual_seed(1)
            self.state["all"] = {"count": 0, "list": [torch.zeros(2)]}

        def step(self, closure=None):
            self.recent.append(3)
            self.seen.add("b")
            torch.rand(1, generator=self.rng)
            self.state["all"]["count"] += 1
            self.state["all"]["list"].append(torch.ones(1))
            self.state["all"]["list"][0].add_(1)
            self.created = True
            return super().step(closure)

    parameters = weights()
    inner = Odd(parameters)
    recent, first = inner.recent, inner.state["all"]["list"][0]
    before = inner.rng.get_state()
    give_gradients(parameters, 0)
    STEPOptimizer(inner, kl=lambda: 1.0, budget=0.5, controller=Gate()).step()
    assert (inner.recent, inner.seen, inner.state["all"]["count"]) == (deque([1, 2]), {"a"}, 0)
    assert inner.recent is recent
    assert inner.state["all"]["list"] == [first]
    assert not first.any()
    assert not hasattr(inner, "created")
    assert torch.equal(inner.rng.get_state(), before)


# Those for which theta_t + alpha (candidate - theta_t) is a step at lr alpha, state included.
LINEAR = {name: INNER[name] for name in ("AdamW", "SGD", "RMSprop", "Adagrad", "NAdam")} | {
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "Adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr, weight_decay=0.0),
    "Muon": lambda p, lr: torch.optim.Muon([q for q in p if q.dim() == 2], lr=lr, weight_decay=0.0),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("alpha", [0.5, 0.03])
def test_a_part_of_a_step_is_a_step_at_a_smaller_learning_rate(name, alpha):
    """To 3e-5 of the step (float64 weights), with the same optimizer state."""
    runs = []
    for wrapped in (True, False):
        parameters = weights((6, 5), (4, 3), dtype=torch.float64)
        inner = LINEAR[name](parameters, 0.01)
        for step in range(3):
            give_gradients(parameters, step)
            inner.step()
        start = [p.detach().clone() for p in parameters]
        give_gradients(parameters, 9)
        if wrapped:
            STEPOptimizer(inner, kl=over_once(), budget=0.5, controller=Part(alpha)).step()
        else:
            inner.param_groups[0]["lr"] *= alpha
            inner.step()
        way = torch.cat([(p.detach() - s).flatten() for p, s in zip(parameters, start, strict=True)])
        runs.append((way, bits(list(inner.state.values()))))
    (a, state), (b, other) = runs
    assert float((a - b).norm() / b.norm()) < 3e-5
    assert float(b.norm()) > 0
    assert state == other


def test_gradients_that_a_step_overwrites_come_back():
    """An optimizer that writes into `.grad` (a clip, a sign) is undone there too."""

    class Overwriting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.sign_()
            return super().step(closure)

    parameters = weights()
    optimizer = STEPOptimizer(Overwriting(parameters, lr=0.1), kl=lambda: 1.0, budget=0.5, controller=Gate())
    give_gradients(parameters, 0)
    before = [(id(p.grad), bits(p.grad)) for p in parameters]
    optimizer.step()
    assert [(id(p.grad), bits(p.grad)) for p in parameters] == before


def test_under_a_gate_a_committed_step_calls_the_kl_closure_once():
    """A closure that samples sees one call a step, and what it draws is put back.

    The first two steps look besides at what it reads where nothing has moved (`FixedReference`).
    """
    parameters = weights()
    calls = []

    def kl():
        calls.append(torch.rand(1))
        return 0.0

    optimizer = STEPOptimizer(torch.optim.SGD(parameters, lr=0.1), kl=kl, budget=1.0, controller=Gate())
    stream = torch.get_rng_state()
    for step in range(5):
        give_gradients(parameters, step)
        optimizer.step()
    assert len(calls) == 5 + 2
    assert torch.equal(torch.get_rng_state(), stream)
    assert math.isclose(float(calls[0]), float(calls[1]))
