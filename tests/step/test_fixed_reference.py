"""Plain functions that measure from a fixed policy, not from the weights before the step, are noticed."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from step_optim import Budget, Gate, Interpolate, PolicyKL, STEPOptimizer, kl_closure
from tests.strategies import Policy, bits

SEEMS = "seems to measure from a fixed reference"


class Problem:
    """A weight that SGD moves by ``lr`` a step, and a quadratic KL from a point that is kept up to date, or is not."""

    def __init__(self, lr: float = 0.1, *, fresh: bool, offset: float = 0.0) -> None:
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.before = self.weight.detach().clone()
        self.inner = torch.optim.SGD([self.weight], lr=lr)
        self.fresh, self.offset, self.calls = fresh, offset, 0

    def kl(self) -> torch.Tensor:
        self.calls += 1
        return ((self.weight - self.before) ** 2).sum() + self.offset

    def ready(self) -> None:
        """Before a step: take the reference, if it is not a fixed one."""
        if self.fresh:
            self.before.copy_(self.weight.detach())
        self.weight.grad = torch.tensor([-1.0, 0.0], dtype=torch.float64)


def told(optimizer: STEPOptimizer, problem: Problem, steps: int, **options: object) -> list[int]:
    """The steps in which the warning came."""
    seen = []
    for step in range(steps):
        problem.ready()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(**options)
        seen += [step for warning in caught if SEEMS in str(warning.message)]
    return seen


BUDGETS = [0.05, 1e-3, Budget(mean=math.inf), Budget(mean=lambda step: 0.05), Budget(slices={"a": 0.05}), 1e-9]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: str(b).partition("<")[0])
@pytest.mark.parametrize("controller", [Gate, Interpolate])
def test_a_fixed_reference_is_told_in_the_first_step_after_one_that_moved(budget, controller) -> None:
    """It reads 0 in the first step, as any; and it is told once, whatever it does from then on."""
    problem = Problem(fresh=False)
    fn = (lambda: {"a": problem.kl()}) if isinstance(budget, Budget) and budget.slices else problem.kl
    optimizer = STEPOptimizer(problem.inner, kl=fn, budget=budget, controller=controller())
    seen = told(optimizer, problem, 12)
    moved = controller is Interpolate or optimizer.summary()["commits"] > 0
    assert seen == ([1] if moved else [])


@pytest.mark.parametrize("budget", BUDGETS[:4], ids=lambda b: str(b).partition("<")[0])
@pytest.mark.parametrize("controller", [Gate, Interpolate])
def test_a_reference_that_is_not_the_weights_at_the_start_is_told_at_once(budget, controller) -> None:
    """The very first step tells of a function that measures from somewhere else."""
    problem = Problem(fresh=False)
    problem.before += 3.0
    assert told(STEPOptimizer(problem.inner, kl=problem.kl, budget=budget, controller=controller()), problem, 4) == [0]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: str(b).partition("<")[0])
@pytest.mark.parametrize("controller", [Gate, Interpolate])
def test_the_right_pattern_is_never_told_and_costs_two_evaluations(budget, controller) -> None:
    """One in the first step, one in the first after a step that moved the weights; then none."""
    problem = Problem(fresh=True)
    fn = (lambda: {"a": problem.kl()}) if isinstance(budget, Budget) and budget.slices else problem.kl
    optimizer = STEPOptimizer(problem.inner, kl=fn, budget=budget, controller=controller())
    assert told(optimizer, problem, 4) == []
    rejects_all = controller is Gate and optimizer.summary()["commits"] == 0
    total = round(optimizer.summary()["audits_per_step"] * 4)
    assert problem.calls == total + (1 if rejects_all else 2)


@given(noise=st.floats(0, 2e-7), budget=st.sampled_from([1e-4, 1e-2, 1.0, math.inf]), lr=st.sampled_from([1e-3, 0.1]))
def test_rounding_is_no_fixed_reference(noise, budget, lr) -> None:
    """Equal policies may read some 1e-7 in float32."""
    problem = Problem(lr, fresh=True, offset=noise)
    assert told(STEPOptimizer(problem.inner, kl=problem.kl, budget=Budget(mean=budget)), problem, 3) == []


def test_a_kl_of_equal_float32_policies_is_no_fixed_reference() -> None:
    """A reference that was computed another way (in one batch, in float64) reads rounding, not a movement."""
    torch.manual_seed(0)
    policy, observations = nn.Linear(16, 512), 3 * torch.randn(64, 16)
    reference: list[torch.Tensor] = []

    def kl() -> torch.Tensor:
        now = torch.cat([policy(part) for part in observations.split(1)]).log_softmax(-1)
        return (now.exp() * (now - reference[0])).sum(-1).mean().abs()

    optimizer = STEPOptimizer(torch.optim.SGD(policy.parameters(), lr=0.1), kl=kl, budget=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            reference[:] = [policy(observations).detach().log_softmax(-1)]
            policy(observations)[:, 0].mean().neg().backward()
            optimizer.step()


def test_readings_as_small_as_rounding_say_so() -> None:
    """Where the budget is that small, rounding matters as much: the text leaves both open."""
    problem = Problem(fresh=True, offset=1e-8)
    optimizer = STEPOptimizer(problem.inner, kl=problem.kl, budget=1e-9)
    problem.ready()
    with pytest.warns(UserWarning, match=r"reads 1e-08 .* \(or it is rounding that is as large as the budget\)"):
        optimizer.step()


def test_the_text_has_the_reading_the_cause_and_the_remedies() -> None:
    """What it read, that unmoved weights have moved by 0, and three ways out."""
    problem = Problem(fresh=False)
    optimizer = STEPOptimizer(problem.inner, kl=problem.kl, budget=0.05)
    problem.ready()
    optimizer.step()
    problem.ready()
    with pytest.warns(UserWarning, match=SEEMS) as caught:
        optimizer.step()
    text = str(caught[0].message)
    for words in ("reads 0.01 ", "is 0:", "before every step()", "PolicyKL", "Budget(drift=...)"):
        assert words in text


WAYS = ["lambda anew", "marked anew", "keyword", "literal", "partial", "window"]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_functions_of_one_step_or_window_are_looked_at_too(way, fresh) -> None:
    """Also if a new function object comes with every step: it is the same function, looked at twice and told once."""
    problem = Problem(fresh=fresh)
    optimizer = STEPOptimizer(problem.inner, budget=0.05)
    marked = kl_closure(problem.kl)
    seen = []
    for step in range(4):
        problem.ready()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if way == "lambda anew":
                optimizer.step(kl=lambda: problem.kl())
            elif way == "marked anew":
                optimizer.step(kl_closure(lambda: problem.kl()))
            elif way == "keyword":
                optimizer.step(kl=problem.kl)
            elif way == "literal":
                optimizer.step(marked)
            elif way == "partial":
                optimizer.step(kl=functools.partial(Problem.kl, problem))
            else:
                with optimizer.window(kl=problem.kl):
                    optimizer.step()
        seen += [step for warning in caught if SEEMS in str(warning.message)]
    assert seen == ([] if fresh else [1])
    if fresh:
        assert problem.calls == round(4 * optimizer.summary()["audits_per_step"]) + 2


def test_a_function_that_is_bound_is_looked_at_anew() -> None:
    """Another one, or the same one once more: once per bound function."""
    problem = Problem(fresh=False)
    optimizer = STEPOptimizer(problem.inner, kl=problem.kl, budget=0.05)
    assert told(optimizer, problem, 3) == [1]
    optimizer.bind(problem.kl)
    assert told(optimizer, problem, 3) == [0]


def test_a_stall_looks_once_more() -> None:
    """A reference that was right in the first two steps, and then was forgotten, is found when steps are rejected."""
    problem = Problem(lr=0.3, fresh=True)
    optimizer = STEPOptimizer(problem.inner, kl=problem.kl, budget=0.05, controller=Interpolate())
    assert told(optimizer, problem, 2) == []
    problem.fresh = False
    steps = told(optimizer, problem, 8)
    assert optimizer.summary()["rejects"] >= 5
    assert len(steps) == 1


def test_looking_leaves_no_trace() -> None:
    """A function that draws, trains BatchNorm and writes weights: the run is the one in which nobody looks."""
    runs = []
    for looked in (True, False):
        torch.manual_seed(0)
        model, observations = Policy(), torch.randn(6, 5)
        inner = torch.optim.AdamW(model.parameters(), lr=0.05)
        reference: list[torch.Tensor] = []

        def kl(model=model, observations=observations, reference=reference) -> float:
            torch.rand(3)
            now = model(observations).log_softmax(-1)
            for p in model.parameters():
                p.data.add_(1.0)
            return float((now.exp() * (now - reference[0])).sum(-1).mean().clamp_min(0))

        optimizer = STEPOptimizer(inner, kl=kl, budget=1e-3)
        if not looked:
            optimizer._run.warned.fixed.is_due = lambda kl: False
        seen = []
        for step in range(4):
            model.eval()
            reference[:] = [model(observations).detach().log_softmax(-1)]
            model.train()
            optimizer.zero_grad()
            model(observations + step).square().mean().backward()
            optimizer.step()
            seen.append((optimizer.last.action, optimizer.last.alpha, optimizer.last.trials))
        runs.append((seen, bits(list(model.parameters())), bits(list(model.buffers())), bits(torch.get_rng_state())))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("on_error", ["raise", "reject"])
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("closure", [False, True])
def test_an_error_while_looking_is_an_error_of_the_audit(on_error, error, closure) -> None:
    """It is raised, or settled as a rejection after the loss closure ran; nothing moves; the next step looks again."""
    problem = Problem(fresh=True)
    fails = [True]

    def kl() -> torch.Tensor:
        if fails:
            fails.clear()
            raise error
        return problem.kl()

    optimizer = STEPOptimizer(problem.inner, kl=kl, budget=1.0, on_error=on_error)
    problem.ready()
    loss = (lambda: torch.tensor(7.0)) if closure else None
    if on_error == "raise" or isinstance(error, KeyboardInterrupt):
        with pytest.raises(type(error)):
            optimizer.step(loss)
    else:
        assert optimizer.step(loss) == (7.0 if closure else None)
    assert (optimizer.last.action, optimizer.last.success) == ("reject", False)
    assert type(error).__name__ in optimizer.last.error
    assert problem.weight.tolist() == [0.0, 0.0]
    assert told(optimizer, problem, 3) == []
    assert problem.calls == 3 + 2


def test_other_kl_closures_are_not_looked_at() -> None:
    """They own their reference."""
    torch.manual_seed(0)
    policy, calls = nn.Linear(3, 4), []

    def logits() -> torch.Tensor:
        calls.append(1)
        return policy(torch.eye(3))

    optimizer = STEPOptimizer(torch.optim.SGD(policy.parameters(), lr=0.1), kl=PolicyKL(logits), budget=1.0)
    made = len(calls)
    for _ in range(3):
        policy.weight.grad = torch.ones(4, 3)
        optimizer.step()
    assert len(calls) - made == 3 + 1
