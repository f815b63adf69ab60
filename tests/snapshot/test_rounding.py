"""Weights with few numbers between theta_t and the candidate: no point is audited twice, none is searched in vain."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from step_optim import Action, Controller, Interpolate, PolicyKL, Project, STEPOptimizer
from step_optim.controllers.search import largest_feasible
from step_optim.host.ranks import Ranks
from step_optim.snapshot.rounding import SAMPLE, Rounding
from step_optim.snapshot.weights import Weights
from tests.controllers.test_search import Problem
from tests.strategies import bits

BF16 = torch.bfloat16


class Net(nn.Module):
    """A policy that computes in float32 on weights of any dtype: what is rounded is the weights alone."""

    def __init__(self, dtype: torch.dtype, width: int = 24) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, width, dtype=dtype), nn.Linear(width, 20, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, bend in ((self.a, torch.tanh), (self.b, lambda y: y)):
            x = bend(x @ layer.weight.float().T + layer.bias.float())
        return x


class Run:
    """Full fine-tuning by AdamW, whose steps are about as long as its learning rate, and so near one ulp in bf16."""

    def __init__(
        self, lr: float, controller: Controller | None = None, seed: int = 0, dtype: torch.dtype = BF16
    ) -> None:
        torch.manual_seed(seed)
        self.net, observations = Net(dtype), torch.randn(32, 8)
        self.data, self.labels = torch.randn(128, 8), torch.randint(20, (128,))
        self.kl = PolicyKL(lambda: self.net(observations))
        inner = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=0.0)
        self.optimizer = STEPOptimizer(inner, kl=self.kl, budget=math.inf, controller=controller)

    def step(self):
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(self.data), self.labels).backward()
        self.optimizer.step()
        return self.optimizer.last

    def over_budget(self, part: float, steps: int) -> list:
        """Records of steps at a budget that is a part of what the second step moved."""
        self.step()
        self.optimizer.budget = part * self.step().accepted.mean
        return [self.step() for _ in range(steps)]


RATES = [2e-4, 1e-3, 4e-3]
"""Less than an ulp of most weights, one, and several."""


@pytest.mark.parametrize("part", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("lr", RATES)
def test_near_one_ulp_a_search_takes_two_audits(lr, part) -> None:
    """As in float32. Without a look at what rounding leaves it took 6 to 14: the curve has a jump at every half ulp."""
    records = Run(lr).over_budget(part, 8)
    counts = [len(record.trials) for record in records if record.triggered]
    assert counts
    assert sum(counts) / len(counts) <= 3
    assert max(counts) <= 4
    assert all(record.accepted.mean <= record.budget.mean for record in records)


class Exhaustive(Controller):
    """Looks at 300 points of the line in order, at none that is a tie of roundings; then searches."""

    def __init__(self) -> None:
        self.feasible: list[float] = []
        self.search = Interpolate(memory=False)

    def decide(self, trial):
        points = [trial.at((i + 1 / math.pi) / 300) for i in range(300)]
        first_over = next(i for i, point in enumerate(points) if not point.feasible)  # rounding makes islands above
        self.feasible = [point.movement.mean for point in points[:first_over]]
        return self.search.decide(trial)


@pytest.mark.parametrize("part", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("lr", RATES)
def test_what_is_committed_is_as_good_as_all_that_could_be(lr, part) -> None:
    """What is feasible on the line, up to the first point that is not, uses hardly more of the budget.

    Rounding makes bends in the curve: a little above a jump K may be smaller than at it.
    """
    run = Run(lr, Exhaustive())
    for record in run.over_budget(part, 2):
        if not record.triggered:
            continue
        assert record.action is Action.SHRINK
        assert record.accepted.mean >= 0.9 * max(run.optimizer.controller.feasible)


class Asks(Controller):
    """Tries some alphas and keeps the points."""

    def __init__(self, *alphas: float) -> None:
        self.alphas = alphas

    def decide(self, trial):
        self.points = [trial.at(alpha) for alpha in self.alphas]
        self.off = trial.at_weights(trial.weights.candidate)
        feasible = [point for point in self.points if point.feasible]
        return trial.accept(feasible[-1]) if feasible else trial.reject()


@pytest.mark.parametrize("kind", ["function", "policy"])
def test_the_same_bits_are_audited_once(kind) -> None:
    """Of one weight one ulp away there are two points; the answers are the same, alphas those that were asked for."""
    weight, before, calls = nn.Parameter(torch.ones(3, dtype=BF16)), torch.ones(3), []

    def distance() -> torch.Tensor:
        calls.append(1)
        return (weight.float() - before).abs().sum()

    def policy() -> torch.Tensor:
        calls.append(1)
        return weight.float()[None] * torch.tensor([1.0, 2.0, 3.0])

    controller = Asks(0.1, 0.3, 0.6, 0.9, 1.0, 0.2)
    kl = distance if kind == "function" else PolicyKL(policy)
    optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=kl, budget=1e-9, controller=controller)
    weight.grad = torch.full((3,), -0.0078125, dtype=BF16)
    made = len(calls)
    optimizer.step()
    assert len(calls) - made == 1 + 2  # theta_t (a reference, or a look), the candidate; and theta_t as a point
    assert [trial.alpha for trial in optimizer.last.trials] == [0.1]
    assert optimizer.last.audits == 2
    assert [point.again for point in controller.points] == [False, True, True, True, True, True]
    assert [point.alpha for point in controller.points] == [0.1, 0.3, 0.6, 0.9, 1.0, 0.2]
    assert [point.feasible for point in controller.points] == [True, True, False, False, False, True]
    assert len({point.movement.mean for point in controller.points}) == 2
    assert optimizer.last.action is Action.REJECT  # what rounding made theta_t
    assert bits(weight) == bits(torch.ones(3, dtype=BF16))
    if kind == "policy":
        assert controller.off.alpha is None
        assert controller.off.again
        assert controller.off.audit.policy is not None


def test_a_point_that_is_accepted_again_is_committed_bit_for_bit() -> None:
    """The weights are those of the audit, whichever of the alphas was asked for last."""
    run = Run(1e-3, Asks(0.3, 0.6, 0.3))
    run.step()
    run.optimizer.budget = 1e3
    run.step()
    moved = run.optimizer.last.accepted.mean
    run.optimizer.budget = 0.5 * moved
    before = [p.detach().clone() for p in run.net.parameters()]
    record = run.step()
    assert len(record.trials) == 2
    assert record.alpha == 0.3
    candidate = run.optimizer._snapshot.previous  # theta_t of the next step: what stands
    assert [bits(p) for p in run.net.parameters()] == [bits(c) for c in candidate]
    assert any(bits(p) != bits(b) for p, b in zip(run.net.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "controller", [Interpolate("bisect"), Interpolate("backtrack"), Interpolate(strict=True), Project()]
)
def test_other_searches_hold_the_budget_and_audit_no_bits_twice(controller) -> None:
    """Each trial of a step on the line is of other weights than all trials before it."""
    seen: list[object] = []
    run = Run(1e-3, controller)
    audit = run.kl.audit

    def counted():
        seen.append(bits(list(run.net.parameters())))
        return audit()

    for record in run.over_budget(0.3, 2):
        assert record.accepted.mean <= record.budget.mean
    run.kl.audit = counted
    run.step()
    trials = run.optimizer.last.trials
    on_line = seen[len(seen) - len(trials) :] if not isinstance(controller, Project) else []
    assert len({str(each) for each in on_line}) == len(on_line)


def test_float32_is_searched_as_ever() -> None:
    """Nothing is rounded away: the search is not told of it."""
    seen = []

    class Looks(Interpolate):
        def decide(self, trial):
            seen.append(trial.realised)
            return super().decide(trial)

    assert any(record.triggered for record in Run(1e-3, Looks(), dtype=torch.float32).over_budget(0.3, 2))
    assert seen == [None] * len(seen)
    Run(1e-3, Looks()).over_budget(0.3, 2)
    assert seen[-1] is not None


@given(
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([BF16, torch.float16, torch.float32, torch.complex64]),
    scale=st.sampled_from([1e-3, 1e-2, 1.0]),
    alphas=st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_what_rounding_leaves_is_foretold(seed, dtype, scale, alphas) -> None:
    """Of tensors that are looked at whole, it is what the weights are after they were written there."""
    torch.manual_seed(seed)
    a, b = nn.Parameter(torch.randn(7, 9, dtype=dtype)), nn.Parameter(torch.randn(5, dtype=torch.float32))
    weights = Weights(torch.optim.SGD([a, b], lr=1.0))
    weights.capture()
    with torch.no_grad():
        a.add_(scale * torch.randn(7, 9, dtype=dtype))
        b.add_(scale * torch.randn(5))
    weights.keep_candidate()
    found = Rounding(weights).realised(alphas, Ranks(None))
    for alpha, part in zip(alphas, found, strict=True):
        weights.go(alpha)
        along, length = weights.alignment()
        # Float32 weights round too, by 2^-24 of themselves (below 4), and are taken not to.
        assert part == pytest.approx(along / length, abs=8 * 2**-24 / scale)


def test_a_large_tensor_is_looked_at_in_part() -> None:
    """`SAMPLE` elements stand for all, and tensors count as often as they have elements."""
    torch.manual_seed(0)
    large, small = nn.Parameter(torch.randn(300, 400).to(BF16)), nn.Parameter(torch.randn(40).to(BF16))
    weights = Weights(torch.optim.SGD([large, small], lr=1.0))
    weights.capture()
    with torch.no_grad():
        for p in (large, small):
            p.add_(4e-3 * torch.randn(p.shape))
    weights.keep_candidate()
    rounding = Rounding(weights)
    assert max(len(previous) for _, previous, _, _ in rounding._ends) <= 2 * SAMPLE
    alphas = [0.1, 0.4, 0.6, 0.9]
    for alpha, part in zip(alphas, rounding.realised(alphas, Ranks(None)), strict=True):
        weights.go(alpha)
        along, length = weights.alignment()
        assert abs(part - along / length) < 0.1


class Steps:
    """K grows like alpha², which is rounded down to one of a few steps; known steps are not measured again."""

    def __init__(self, steps: list[float], best: float) -> None:
        self.steps, self.best = sorted({0.0, 1.0, *steps}), best
        self.audits: list[float] = []

    def realised(self, alphas):
        return [max(step for step in self.steps if step <= alpha) for alpha in alphas]

    def measure(self, alpha: float):
        (step,) = self.realised([alpha])
        again = step in (0.0, 1.0, *self.audits)
        if not again:
            self.audits.append(step)
        ratio = (step / self.best) ** 2
        return type("P", (), {"feasible": ratio <= 1, "ratios": {"mean": ratio}, "again": again})()


@given(
    steps=st.lists(st.floats(0.01, 0.99), max_size=12),
    best=st.floats(0.02, 0.98),
    search=st.sampled_from(["model", "bisect", "backtrack"]),
    told=st.booleans(),
    strict=st.booleans(),
)
def test_among_few_steps_the_largest_feasible_one_is_found_and_none_is_measured_twice(
    steps, best, search, told, strict
) -> None:
    """Whether or not the search is told what rounding leaves; with it, there are no more audits than steps at all."""
    problem = Steps(steps, best)
    found = largest_feasible(
        problem.measure,
        problem.measure(1.0),
        search=search,
        tol=0.01,
        max_trials=24,
        min_alpha=1e-4,
        strict=strict,
        realised=problem.realised if told else None,
    )
    feasible = [step for step in problem.steps if 0 < step <= best]
    (got,) = problem.realised([0.0 if found is None else found[0]])
    assert len(problem.audits) == len(set(problem.audits)) <= len(problem.steps) - 2
    if not feasible:
        assert got == 0.0
    else:
        assert got >= 0.985 * max(feasible)


@given(at_one=st.floats(1.1, 1e3), slope=st.floats(-0.3, 0.3))
def test_where_nothing_is_rounded_the_search_is_the_same(at_one, slope) -> None:
    """Told that nothing is rounded, it finds the same alpha within the tolerance, with one audit more or less."""
    counts = []
    for realised in (None, lambda alphas: list(alphas)):
        problem = Problem([lambda alpha: at_one * alpha**2 * math.exp(2 * slope * (alpha - 1))])
        found = largest_feasible(
            problem.measure, problem.at(1.0), search="model", tol=0.01, max_trials=24, realised=realised
        )
        assert found is not None
        counts.append((found[0], len(problem.asked)))
    assert counts[0][0] == pytest.approx(counts[1][0], rel=0.012)
    assert abs(counts[0][1] - counts[1][1]) <= 1
