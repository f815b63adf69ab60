"""Project: feasible, never worse than interpolation, and faithful to its closed-form target."""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from step_optim import (
    Action,
    Budget,
    Controller,
    ControlSet,
    Interpolate,
    Movement,
    PolicyKL,
    Project,
    STEPOptimizer,
    StepRecord,
    TokenKL,
)
from step_optim.budget import Limits
from step_optim.controllers.mixture import TARGET_TOLERANCE, mixture_strength
from tests import reference
from tests.models import Bigram, control_sets, nudge, ragged_control, tiny_gemma2, tiny_gpt2, tiny_llama


def lora(seed: int = 0) -> nn.Module:
    """Adapters on a frozen Llama."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(tiny_llama(seed=seed), peft.LoraConfig(r=2, target_modules=["v_proj", "down_proj"]))
    nudge(model, 0.3, seed)
    return model


MODELS = {
    "bigram": lambda seed: Bigram(seed=seed),
    "llama": lambda seed: tiny_llama(seed=seed),
    "gpt2, tied head": lambda seed: tiny_gpt2(seed=seed),
    "gemma2, capped": lambda seed: tiny_gemma2(seed=seed),
    "lora": lora,
}


@dataclass
class Result:
    """What one step did, and the oracle's view of the four policies."""

    record: StepRecord
    model: nn.Module
    bare: nn.Module
    previous: reference.Policy
    candidate: reference.Policy
    accepted: reference.Policy
    control: ControlSet

    @property
    def moved(self) -> Movement:
        """Movement of what was committed."""
        return reference.movement(self.accepted, self.previous, self.control.slices)

    @property
    def objective(self) -> float:
        """The paper's projection objective of what was committed."""
        return reference.projection_objective(self.accepted, self.candidate)


def take(controller: Controller, budget: Budget, control: ControlSet, name: str = "llama", seed: int = 0) -> Result:
    """One step from a given model, the same for every controller."""
    size = 3.0 if name == "lora" else 0.3
    model = MODELS[name](seed).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for i, p in enumerate(parameters):
        g = torch.Generator().manual_seed(1000 * seed + i)
        p.grad = torch.randn(p.shape, generator=g) * float(p.detach().std(unbiased=False) + 1e-3)
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(parameters, [q for q in bare.parameters() if q.requires_grad], strict=True):
            q.sub_(size * p.grad)
    previous, candidate = reference.policy_of(model, control), reference.policy_of(bare, control)
    optimizer = STEPOptimizer(
        torch.optim.SGD(parameters, lr=size), kl=TokenKL(model, control), budget=budget, controller=controller
    )
    optimizer.step()
    return Result(optimizer.last, model, bare, previous, candidate, reference.policy_of(model, control), control)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=3)
@given(
    control=control_sets(max_prompts=4),
    mean=st.sampled_from([1e-4, 1e-3, math.inf]),
    slices=st.sampled_from([3e-4, 1e-3, math.inf]),
    seed=st.integers(0, 50),
)
def test_feasible_and_never_worse_than_interpolation(name, control, mean, slices, seed) -> None:
    """What Project commits is within every budget by the oracle, and no farther from the candidate than Interpolate."""
    budget = Budget(mean=mean, slices=slices if control.slices else None)
    projected = take(Project(), budget, control, name, seed)
    shrunk = take(Interpolate(), budget, control, name, seed)
    limits = dict.fromkeys(control.slices, slices * 1.002)
    assert reference.within(projected.moved, mean * 1.002, limits)
    assert projected.objective <= shrunk.objective * (1 + 1e-4) + 1e-12
    assert projected.record.candidate == shrunk.record.candidate
    assert projected.record.triggered == shrunk.record.triggered
    if projected.record.triggered:
        assert projected.record.action in (Action.PROJECT, Action.SHRINK)
        assert projected.record.accepted.mean == pytest.approx(projected.moved.mean, rel=2e-3)
    else:
        assert projected.record.action is Action.COMMIT
        assert projected.record.projection == {}


@pytest.mark.parametrize("name", MODELS)
def test_residuals_equal_the_oracle(name) -> None:
    """The three residuals of the record are those of the committed policy, the target and the interpolated start."""
    control = ragged_control()
    budget = Budget(mean=1e-4, slices={"early": 0.5e-4})
    projected = take(Project(), budget, control, name)
    shrunk = take(Interpolate(), budget, control, name)
    record = projected.record.projection
    assert set(record) == {
        "residual",
        "residual_target",
        "residual_interpolation",
        "steps",
        "strength_min",
        "strength_max",
    }
    assert record["residual"] == pytest.approx(projected.objective, rel=1e-3)
    assert record["residual_interpolation"] == pytest.approx(shrunk.objective, rel=1e-3)
    assert record["residual"] <= record["residual_interpolation"]
    assert 1 <= record["steps"] <= Project().steps
    twin = MODELS[name](0)
    kl = TokenKL(twin, control)
    kl.anchor()
    for p, q in zip(twin.parameters(), projected.bare.parameters(), strict=True):
        p.data.copy_(q)
    strength = mixture_strength(kl, kl.audit(), projected.record.budget).tolist()
    assert min(strength) < 1
    target = reference.mixture(projected.candidate, projected.previous, strength)
    assert record["residual_target"] == pytest.approx(
        reference.projection_objective(projected.accepted, target), rel=1e-3
    )


def mixture_movement(
    candidate: reference.Policy, previous: reference.Policy, strength: list[float], slices
) -> Movement:
    """Movement of the geometric mixture."""
    return reference.movement(reference.mixture(candidate, previous, strength), previous, slices)


def far_and_near(control: ControlSet) -> tuple[Bigram, STEPOptimizer, Tensor]:
    """A table in which the "far" prompts' tokens move a hundred times as much as the "near" ones'."""
    model = Bigram()
    optimizer = torch.optim.SGD([model.embedding.weight], lr=1.0)
    grad = torch.randn(model.embedding.weight.shape, generator=torch.Generator().manual_seed(3)) * 0.02
    grad[20:40] *= 30
    model.embedding.weight.grad = grad
    return model, optimizer, grad


def test_slices_inside_their_budget_keep_their_movement() -> None:
    """One slice is far over budget: interpolation shrinks both alike, projection keeps nearly all of the other's."""
    control = ControlSet.from_ids([[1, 2], [20]], [[3, 4, 5], [21, 22]], {"near": [0], "far": [1]})
    moved = {}
    for controller in (Interpolate(), Project(steps=8)):
        model, optimizer, _ = far_and_near(control)
        step = STEPOptimizer(optimizer, kl=TokenKL(model, control), budget=Budget(slices=1e-3), controller=controller)
        step.step()
        record = step.last
        assert record.bound == "slice:far"
        assert record.candidate.slices["near"] < 1e-3 < record.candidate.slices["far"]
        assert max(record.accepted.slices.values()) <= 1e-3
        moved[type(controller)] = record.accepted.slices
    assert moved[Project]["near"] > 10 * moved[Interpolate]["near"]
    assert moved[Project]["near"] > 0.5 * record.candidate.slices["near"]
    assert moved[Project]["far"] > 0.5e-3


def test_more_steps_do_not_hurt() -> None:
    """The residual does not grow with the number of distillation steps, since the best point is kept."""
    residuals = [
        take(Project(steps=steps), Budget(mean=1e-3), ragged_control()).record.projection["residual"]
        for steps in (1, 2, 4, 8)
    ]
    assert all(b <= a * (1 + 1e-5) for a, b in pairwise(residuals))


def test_nothing_feasible_is_a_rejection() -> None:
    """A budget of 0 leaves the weights bit for bit, and the step counts as rejected, as it does under Interpolate."""
    for controller in (Interpolate(), Project()):
        before = MODELS["llama"](0)
        result = take(controller, Budget(mean=0.0), ragged_control())
        for p, q in zip(result.model.parameters(), before.parameters(), strict=True):
            assert torch.equal(p, q)
        assert result.record.accepted.mean == 0.0
        assert result.record.action is Action.REJECT, type(controller)


def test_a_feasible_candidate_is_committed_as_it_is() -> None:
    """Project does nothing within the budget."""
    result = take(Project(), Budget(mean=math.inf), ragged_control())
    assert result.record.action is Action.COMMIT
    assert result.objective < 1e-9
    assert result.record.trials == ()


def test_projection_over_a_discrete_policy() -> None:
    """PolicyKL over logits can be projected too; the committed policy is the audited one."""
    observations = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        actor = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    old = copy.deepcopy(actor).double()
    kl = PolicyKL(lambda: actor(observations), {"left": range(4), "right": range(4, 8)})
    step = STEPOptimizer(
        torch.optim.SGD(actor.parameters(), lr=1.0), kl=kl, budget=Budget(slices=0.01), controller=Project()
    )
    for i, p in enumerate(actor.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    step.step()
    assert step.last.action is Action.PROJECT
    with torch.no_grad():
        pairs = zip(copy.deepcopy(actor).double()(observations.double()), old(observations.double()), strict=True)
        rows = [reference.row_kl(c.tolist(), p.tolist()) for c, p in pairs]
    assert step.last.accepted.slices["left"] == pytest.approx(sum(rows[:4]) / 4, rel=1e-3)
    assert step.last.accepted.slices["right"] == pytest.approx(sum(rows[4:]) / 4, rel=1e-3)
    assert max(step.last.accepted.slices.values()) <= 0.01


def frozen_head(seed: int) -> nn.Module:
    """Llama in float64 whose head does not train."""
    model = tiny_llama(seed=seed, dtype=torch.float64)
    model.lm_head.requires_grad_(False)
    return model


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(frozen_head, id="frozen head"),
        pytest.param(lambda seed: Bigram(seed=seed, dtype=torch.float64), id="full logits"),
        pytest.param(lambda seed: tiny_gemma2(seed=seed, dtype=torch.float64), id="own head"),
        pytest.param(lambda seed: tiny_llama(seed=seed, dtype=torch.float64), id="trained head"),
        pytest.param(lambda seed: tiny_gpt2(seed=seed, dtype=torch.float64, dropout=0), id="tied"),
    ],
)
@settings(max_examples=3)
@given(lambdas=st.lists(st.floats(0, 1), min_size=4, max_size=4), seed=st.integers(0, 50))
def test_distillation_loss_and_gradient(make, batch, lambdas, seed) -> None:
    """In float64, `distill` gives the mean squared distance to the mixture and its gradient, whatever the batching."""
    control, model = ragged_control(), make(seed)
    kl = TokenKL(model, control, micro_batch=batch)
    kl.anchor()
    previous = reference.policy_of(model, control)
    nudge(model, 0.3, seed)
    audit, candidate = kl.audit(), reference.policy_of(model, control)
    nudge(model, 0.3, seed + 1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    strength = torch.tensor(lambdas, dtype=torch.float64)
    here, loss, gradients = kl.distill(audit, strength, parameters)
    target = reference.mixture(candidate, previous, lambdas)
    assert loss == pytest.approx(reference.projection_objective(reference.policy_of(model, control), target), rel=1e-6)
    assert kl.distance(here, audit, strength) == pytest.approx(loss, rel=1e-6)
    assert here.movement.mean == pytest.approx(kl().mean, rel=1e-9)
    total = torch.zeros((), dtype=torch.float64)
    for i, (prompt, response) in enumerate(zip(control.prompts, control.responses, strict=True)):
        out = model(torch.cat([prompt, response])[None])
        logits = (out if isinstance(out, Tensor) else out.logits)[0, len(prompt) - 1 : -1]
        total = total + (logits - torch.tensor(target[i], dtype=torch.float64)).square().sum(1).mean() / len(control)
    for mine, true in zip(gradients, torch.autograd.grad(total, parameters), strict=True):
        # The model itself normalises in float32.
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5 * float(true.abs().max()))


class Table(nn.Module):
    """Logits as weights: the policy is whatever it is set to."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self) -> Tensor:
        """Read them."""
        return self.logits


def tables(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a previous and a candidate policy whose observations move by amounts from 1e-4 to 1 nat."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 7, generator=g)
    sizes = 10 ** (torch.rand(count, 1, generator=g) * 2 - 2)
    return z, z + sizes * torch.randn(count, 7, generator=g)


def target(
    previous: Tensor, candidate: Tensor, slices: dict[str, list[int]], limits: Limits
) -> tuple[list[float], Movement]:
    """The strengths that `mixture_strength` finds, and the oracle's movement of that mixture."""
    table = Table(previous)
    kl = PolicyKL(table, slices)
    kl.anchor()
    with torch.no_grad():
        table.logits.copy_(candidate)
    strength = mixture_strength(kl, kl.audit(), limits).tolist()
    policies = [[[row] for row in z.double().tolist()] for z in (candidate, previous)]
    return strength, mixture_movement(*policies, strength, slices)


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
budgets = st.floats(-4, 0).map(lambda exponent: 10**exponent)


@settings(max_examples=100)
@given(sizes=sizes, data=st.data(), seed=st.integers(0, 1000))
def test_mixture_strength_of_a_partition(sizes, data, seed) -> None:
    """Each slice of a partition is at its budget, to 4 %, or keeps the whole candidate (lambda = 1) below it."""
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    slices = {f"s{i}": list(range(bounds[i], bounds[i + 1])) for i in range(len(sizes))}
    limits = {name: data.draw(budgets) for name in slices}
    strength, moved = target(*tables(bounds[-1], seed), slices, Limits(slices=limits))
    for name, members in slices.items():
        lambdas = {strength[i] for i in members}
        assert len(lambdas) == 1
        assert moved.slices[name] <= 1.041 * limits[name]
        assert lambdas == {1.0} or moved.slices[name] >= 0.96 * limits[name]


@settings(max_examples=100)
@given(count=st.integers(1, 8), limit=budgets, seed=st.integers(0, 1000))
def test_mixture_strength_of_a_global_budget(count, limit, seed) -> None:
    """With a global budget alone the mixture is at it, to 4 %, or the candidate whole."""
    strength, moved = target(*tables(count, seed), {}, Limits(mean=limit))
    assert moved.mean <= 1.041 * limit
    assert set(strength) == {1.0} or moved.mean >= 0.96 * limit


@settings(max_examples=100)
@given(
    members=st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 5), min_size=1, unique=True), min_size=1),
    limit=budgets,
    mean=budgets,
    seed=st.integers(0, 1000),
)
def test_mixture_strength_under_overlapping_slices_and_a_global_budget(members, limit, mean, seed) -> None:
    """No combination of constraints is far exceeded, and nothing is weakened far beyond what the tightest asks."""
    limits = Limits(mean=mean, slices=dict.fromkeys(members, limit))
    strength, moved = target(*tables(6, seed), members, limits)
    ratios = limits.judge(moved).ratios
    assert max(ratios.values()) <= 1.5
    if min(strength) < 1:
        assert max(ratios.values()) >= 0.7


def test_mixture_strength_where_slices_overlap() -> None:
    """A prompt in two slices: the looser one is still brought to its budget."""
    slices = {"a": [0], "b": [0, 1, 2], "c": [1]}
    _, moved = target(*tables(6, 136), slices, Limits(mean=1.0, slices=dict.fromkeys(slices, 0.01)))
    assert max(moved.slices.values()) <= 0.0105


def test_mixture_strength_to_the_tolerance_that_it_names() -> None:
    """A target's KL is within TARGET_TOLERANCE of its budget."""
    for seed in range(20):
        strength, moved = target(*tables(5, seed), {}, Limits(mean=0.05))
        assert moved.mean <= (1 + TARGET_TOLERANCE) * 0.05
        assert set(strength) == {1.0} or moved.mean >= (1 - TARGET_TOLERANCE) * 0.05


@pytest.mark.parametrize("budget", [1e-4, 1e-2, 1.0])
def test_mixture_strength_of_a_certain_policy_that_flips(budget) -> None:
    """A token that was certain becomes another certain one: K(lambda) is exponential, and still meets the budget."""
    previous, candidate = torch.tensor([[12.0, 0, 0]]), torch.tensor([[0.0, 12, 0]])
    strength, moved = target(previous, candidate, {"a": [0]}, Limits(slices={"a": budget}))
    assert 0 < strength[0] < 1
    assert moved.slices["a"] == pytest.approx(budget, rel=0.05)


def test_bad_arguments() -> None:
    """Steps and options are checked at construction."""
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        Project(steps=0)
    with pytest.raises(ValueError, match=r"tol=1\.5 must lie between 0 and 1"):
        Project(tol=1.5)
    with pytest.raises(ValueError, match="max_trials=0 must be at least 1"):
        Project(max_trials=0)
    with pytest.raises(ValueError, match="on_reject='forget' is unknown; use 'restore' or 'keep_state'"):
        Project(on_reject="forget")
