"""Rollbacks are exact, and with an infinite budget nothing can tell that the wrapper is there."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from step_optim import Action, Budget, Gate, Interpolate
from tests.strategies import INNER, Problem, picture, policy_problem, problems, token_problem, wrap


@given(problem=problems(), before=st.integers(0, 3))
def test_a_rejected_step_leaves_no_trace(problem, before):
    """Parameters, state, identities, groups, attributes, grads, modes, buffers, RNG are those before, bit for bit."""
    optimizer = wrap(problem, Budget(mean=math.inf), Gate())
    for step in range(before):
        problem.backward(step)
        optimizer.step()
    problem.backward(before)
    optimizer.set_budget(Budget(mean=0.0))
    taken = picture(problem.model, optimizer)
    optimizer.step()
    if optimizer.last.action is Action.REJECT:
        assert picture(problem.model, optimizer) == taken
    else:  # a movement too small to see
        assert optimizer.last.candidate.mean == 0


@given(
    seed=st.integers(0, 1000),
    inner=st.sampled_from(sorted(INNER)),
    rejected=st.sets(st.integers(0, 7), max_size=5),
    token=st.booleans(),
)
def test_the_run_after_rejections_is_one_in_which_they_never_were(seed, inner, rejected, token):
    """Rejecting steps in between changes no later bit."""
    build = token_problem if token else policy_problem

    def run(rejects: set[int]) -> Problem:
        problem = build(seed, inner=inner)
        optimizer = wrap(problem, Budget(mean=math.inf), Gate())
        for step in range(8):
            if step in rejects:
                problem.backward(50 + step)
                optimizer.zero_grad()
                for p in problem.model.parameters():
                    p.grad = torch.full_like(p, 0.37)
                optimizer.set_budget(Budget(mean=0.0))
                optimizer.step()
                assert optimizer.last.action is Action.REJECT
                optimizer.set_budget(Budget(mean=math.inf))
            else:
                # The training forwards of rejected steps have drawn random numbers and moved BatchNorm: not ours to
                # undo, so both runs draw them.
                if step in rejected:
                    problem.backward(50 + step)
                problem.backward(step)
                optimizer.step()
        return problem

    kept = [step for step in range(8) if step not in rejected]
    a = run(rejected)
    problem = build(seed, inner=inner)
    optimizer = wrap(problem, Budget(mean=math.inf), Gate())
    for step in range(8):
        if step in kept:
            problem.backward(step)
            optimizer.step()
        else:
            problem.backward(50 + step)
    assert picture(a.model, a.optimizer)["parameters"] == picture(problem.model, problem.optimizer)["parameters"]
    assert picture(a.model, a.optimizer)["state"] is not None
    left, right = picture(a.model, a.optimizer), picture(problem.model, problem.optimizer)
    assert left["buffers"] == right["buffers"]
    assert left["rng"] == right["rng"]
    assert left["groups"] == right["groups"]


@given(problem=problems(), accumulate=st.integers(1, 3), scheduler=st.booleans())
def test_with_an_infinite_budget_the_run_is_bit_identical_to_the_bare_one(problem, accumulate, scheduler):
    """Dozens of steps with dropout, a scheduler and gradient accumulation: parameters, state, RNG and losses agree."""

    def run(problem: Problem, optimizer: torch.optim.Optimizer) -> list[float]:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24) if scheduler else None
        losses = []
        for step in range(24):
            optimizer.zero_grad()
            problem.model.train()
            for part in range(accumulate):
                loss = problem.loss(step * accumulate + part) / accumulate
                loss.backward()
                losses.append(float(loss.detach()))
            optimizer.step()
            if schedule is not None:
                schedule.step()
        return losses

    twin = copy.deepcopy(problem.model)
    inner = type(problem.optimizer)
    options = {k: v for k, v in problem.optimizer.defaults.items() if k not in ("differentiable", "fused")}
    options = {k: copy.deepcopy(v) for k, v in options.items()}
    if inner is torch.optim.ASGD or inner is torch.optim.Rprop:
        options.pop("decoupled_weight_decay", None)
    trained = [q for p, q in zip(problem.model.parameters(), twin.parameters(), strict=True) if p.requires_grad]
    bare = inner(trained, **_accepted(inner, options))
    torch.manual_seed(99)
    records = []
    optimizer = wrap(problem, Budget(mean=math.inf, slices=math.inf), log=lambda record, step: records.append(record))
    wrapped_losses = run(problem, optimizer)
    wrapped = picture(problem.model, problem.optimizer)
    torch.manual_seed(99)
    bare_losses = run(Problem(twin, bare, problem.kl, problem.batch), bare)
    alone = picture(twin, bare)
    # A run that diverges has no KL in the end, and a policy without KL is never committed.
    assume(all(record["error"] is None for record in records))
    assert wrapped_losses == bare_losses
    for part in ("parameters", "buffers", "modes", "groups", "rng"):
        assert wrapped[part] == alone[part], part
    assert [value for _, _, value in wrapped["state"]] == [value for _, _, value in alone["state"]]


def _accepted(inner: type, options: dict) -> dict:
    names = inner.__init__.__code__.co_varnames[
        : inner.__init__.__code__.co_argcount + inner.__init__.__code__.co_kwonlyargcount
    ]
    return {name: value for name, value in options.items() if name in names}


@given(problem=problems(), controller=st.sampled_from(["gate", "shrink"]))
def test_the_grad_of_every_parameter_survives_the_controller(problem, controller):
    """Gradients after a controlled step are the gradients before it: audits and searches never touch them."""
    optimizer = wrap(problem, Budget(mean=1e-12), Gate() if controller == "gate" else Interpolate(max_trials=4))
    problem.backward(0)
    before = picture(problem.model, optimizer)["gradients"]
    optimizer.step()
    assert picture(problem.model, optimizer)["gradients"] == before


class Tampering(torch.optim.SGD):
    """Mutates gradients, sets attributes, group values, and makes state: all that a rollback has to undo."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.history = []
        self.table = {"steps": 0, "nested": [torch.zeros(2)]}
        self.generator = torch.Generator().manual_seed(3)

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(2.0)
                    p.data = p.data + torch.randn(p.shape, generator=self.generator) + torch.rand(p.shape)
                    p.data.add_(p.grad, alpha=-group["lr"])
        self.history.append(len(self.history))
        self.table["steps"] += 1
        self.table["nested"][0] += 1
        self.table["new"] = torch.ones(1)
        self.extra = "made later"


def test_everything_reachable_from_the_optimizer_is_rolled_back():
    """Attributes, nested containers, generators, mutated grads, swapped .data: the next candidate is the same."""
    weight = torch.nn.Parameter(torch.randn(4))
    inner = Tampering([weight], lr=0.1)
    model = torch.nn.Module()
    model.weight = weight
    seen = []
    problem = Problem(model, inner, None, lambda step: None)
    optimizer = wrap(
        Problem(model, inner, lambda: seen.append(weight.detach().clone()) or 1.0, problem.batch), 0.5, Gate()
    )
    weight.grad = torch.randn(4)
    grad, address = weight.grad, weight.data_ptr()
    before = picture(model, optimizer)
    nested = inner.table["nested"][0]
    optimizer.step()
    optimizer.step()
    start, *candidates = seen  # theta_t was looked at first, see `FixedReference`
    assert torch.equal(start, weight)
    assert torch.equal(*candidates)
    assert picture(model, optimizer) == before
    assert weight.grad is grad
    assert weight.data_ptr() == address
    assert inner.table["nested"][0] is nested
    assert "k" not in inner.param_groups[0]
    assert not hasattr(inner, "extra")


def test_a_loss_closure_keeps_the_random_numbers_that_it_drew():
    """A rejected step rewinds the RNG of the inner step, but not what the closure drew: it may have drawn the data."""
    problem = policy_problem(6)
    optimizer = wrap(problem, Budget(mean=0.0), Gate())

    def closure():
        problem.model.train()
        optimizer.zero_grad()
        loss = problem.loss(0) + torch.randn(()) * 0
        loss.backward()
        return loss

    state = torch.get_rng_state()
    optimizer.step(closure)
    assert optimizer.last.action is Action.REJECT
    assert not torch.equal(torch.get_rng_state(), state)


def test_sparse_and_unusual_parameters_roll_back():
    """0-dim, empty, complex, non-contiguous, grad None and sparse-grad parameters come back bit for bit."""
    table = torch.nn.Parameter(torch.randn(6, 3))
    parts = {
        "scalar": torch.nn.Parameter(torch.tensor(0.3)),
        "empty": torch.nn.Parameter(torch.zeros(0, 3)),
        "complex": torch.nn.Parameter(torch.randn(3, dtype=torch.complex64)),
        "transposed": torch.nn.Parameter(torch.randn(4, 5).t()),
        "no_grad": torch.nn.Parameter(torch.randn(2)),
        "table": table,
    }
    model = torch.nn.ParameterDict(parts)
    for name, p in parts.items():
        if name not in ("no_grad", "table"):
            p.grad = torch.randn_like(p)
    table.grad = torch.sparse_coo_tensor([[1, 4]], torch.randn(2, 3), (6, 3), check_invariants=True)
    inner = torch.optim.SGD(model.values(), lr=0.1)
    optimizer = wrap(Problem(model, inner, lambda: 1.0, lambda step: None), 0.5, Gate())
    before = picture(model, optimizer)
    optimizer.step()
    assert optimizer.last.action is Action.REJECT
    assert optimizer.last.update_norm > 0
    assert picture(model, optimizer) == before
    optimizer.step(kl=lambda: float(parts["scalar"].detach() != 0.3) * 0.4)
    assert optimizer.last.action is Action.COMMIT
    assert picture(model, optimizer)["parameters"] != before["parameters"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_audits_leave_modes_buffers_and_random_streams_alone(mode):
    """A KL closure that samples and runs BatchNorm in train mode disturbs nothing, on commit and on reject."""
    problem = policy_problem(7)
    getattr(problem.model, mode)()
    problem.model.drop.eval()  # a mixed state: the flag of every module counts
    x = torch.randn(9, 5)

    def closure():
        assert not torch.is_grad_enabled()
        torch.rand(3)
        problem.model(x)
        assert not problem.model.norm.training
        return 0.3

    for budget in (0.5, 0.1):
        optimizer = wrap(Problem(problem.model, problem.optimizer, closure, problem.batch), budget, Gate())
        problem.loss(0).backward()
        before = picture(problem.model, optimizer)
        optimizer.step()
        after = picture(problem.model, optimizer)
        for part in ("modes", "buffers", "rng"):
            assert after[part] == before[part]
