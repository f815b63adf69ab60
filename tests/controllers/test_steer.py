"""Steer: inside of every budget, near the candidate, never stuck at a cap."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from step_optim import Budget, Gate, Interpolate, Movement, PolicyKL, Steer, STEPOptimizer, TokenKL
from step_optim.controllers import Action
from tests.models import ragged_control, tiny_llama

INPUTS = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
SLICES = {"a": [0, 1, 2], "b": [3, 4, 5]}


class World:
    """A small policy that is pushed the same way again and again, with a pool of other observations."""

    def __init__(self, seed: int = 0, *, categorical: bool = True, pool: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layer = nn.Linear(4, 3, dtype=torch.float64)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
        self.goal = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        others = torch.randn(9, 4, generator=generator, dtype=torch.float64)
        make = self.categorical if categorical else self.normal
        source = PolicyKL(lambda: make(others), {"a": range(5), "b": range(5, 9)}, noise_floor=False)
        self.kl = PolicyKL(lambda: make(INPUTS), SLICES, noise_floor=False, pool=source if pool else None)

    def categorical(self, inputs: torch.Tensor):
        return self.layer(inputs)

    def normal(self, inputs: torch.Tensor):
        return torch.distributions.Independent(torch.distributions.Normal(self.layer(inputs), 1.0), 1)

    def loss(self) -> torch.Tensor:
        return (self.layer(INPUTS) - self.goal).square().mean()

    def optimizer(self, budget, controller=None, lr: float = 0.1, kind=torch.optim.Adam) -> STEPOptimizer:
        inner = kind(self.layer.parameters(), lr=lr)
        return STEPOptimizer(inner, kl=self.kl, budget=budget, controller=controller or Steer())

    def step(self, optimizer: STEPOptimizer):
        optimizer.zero_grad()
        self.loss().backward()
        optimizer.step()
        return optimizer.last


BOUNDS = st.one_of(st.just(math.inf), st.floats(1e-4, 0.3))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    lr=st.sampled_from([0.01, 0.1, 1.0]),
    mean=BOUNDS,
    slice_b=BOUNDS,
    drift=BOUNDS,
    drift_a=BOUNDS,
    options=st.fixed_dictionaries(
        {
            "aim": st.sampled_from([0.5, 0.9, 1.0]),
            "average": st.sampled_from([0.0, 0.5, 0.85]),
            "corrections": st.integers(1, 3),
            "prompts": st.sampled_from([None, 2]),
        }
    ),
)
def test_no_budget_is_ever_exceeded(seed, lr, mean, slice_b, drift, drift_a, options) -> None:
    """Mean, slices, drift and its slices together, whatever the rate; what is committed is what was audited."""
    world = World(seed)
    budget = Budget(mean=mean, slices={"b": slice_b}, drift=drift, drift_slices={"a": drift_a})
    optimizer = world.optimizer(budget, Steer(**options), lr=lr)
    origin = copy.deepcopy(world.layer)
    for _ in range(6):
        before = copy.deepcopy(world.layer)
        record = world.step(optimizer)
        step, way = movement(world.layer, before), movement(world.layer, origin)
        assert step.mean == pytest.approx(record.accepted.mean, rel=1e-6, abs=1e-15)
        assert way.mean == pytest.approx(record.reference_drift.mean, rel=1e-6, abs=1e-15)
        slack = 1 + 1e-9
        assert step.mean <= mean * slack
        assert step.slices["b"] <= slice_b * slack
        assert way.mean <= drift * slack
        assert way.slices["a"] <= drift_a * slack


def movement(now: nn.Linear, before: nn.Linear) -> Movement:
    """KL(now ‖ before) of the categorical policy, by torch."""
    with torch.no_grad():
        here, there = (torch.distributions.Categorical(logits=layer(INPUTS)) for layer in (now, before))
        every = torch.distributions.kl_divergence(here, there)
    return Movement.over(every.tolist(), SLICES)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), lr=st.sampled_from([0.01, 0.1, 1.0]), cap=st.floats(1e-3, 1.0))
def test_a_cap_does_not_end_learning(seed, lr, cap) -> None:
    """No step is rejected, and the loss falls on along the cap, where a controller that shrinks is stuck."""
    world, twin = (World(seed, categorical=False, pool=False) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steered = world.optimizer(Budget(drift=cap), lr=lr)
        shrunk = twin.optimizer(Budget(drift=0.8 * cap), Interpolate(), lr=lr)
        records = [(world.step(steered), twin.step(shrunk)) for _ in range(25)]
    assert all(a.action is not Action.REJECT for a, _ in records)
    assert world.loss() <= twin.loss() * (1 + 1e-3)


def test_one_linear_constraint_is_the_projection() -> None:
    """sqrt(KL) of a Normal with one observation is linear on either side: the nearest point has a closed form."""
    layer, there = nn.Linear(3, 1, bias=False, dtype=torch.float64), torch.tensor([[1.0, -2.0, 0.5]]).double()
    kl = PolicyKL(lambda: torch.distributions.Normal(layer(there)[:, 0], 1.0), noise_floor=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the missing pool
        optimizer = STEPOptimizer(
            torch.optim.SGD(layer.parameters(), lr=1.0),
            kl=kl,
            budget=Budget(drift=0.02),
            controller=Steer(aim=0.81, far=1e6),
        )
    start = layer.weight.detach().clone()
    gradient = torch.tensor([[-1.0, 0.3, 2.0]]).double()
    layer.weight.grad = gradient.clone()
    optimizer.step()
    candidate = start - gradient
    allowed = math.sqrt(2 * 0.81 * 0.02)  # |difference of the means| at the aim
    moved = float(((candidate - start) * there).sum())
    wanted = candidate - (moved - math.copysign(allowed, moved)) * there / there.square().sum()
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-6, atol=1e-9)
    assert optimizer.last.steering["corrections"] == 1
    assert optimizer.last.audits == 2


@pytest.mark.filterwarnings("ignore:PolicyKL has no pool")
def test_the_record_tells_what_was_measured_on_the_pool() -> None:
    """Of a pool that has the control set's observations it is the candidate's own drift; of none there is nothing."""
    for pool in (True, False):
        world = World(pool=pool)
        if pool:
            world.kl.pool = PolicyKL(lambda: world.layer(INPUTS), SLICES, noise_floor=False)  # noqa: B023
        last = world.step(world.optimizer(Budget(drift=0.005, drift_slices={"a": 0.004}), lr=0.2))
        assert (last.action, last.steering["corrections"]) == (Action.STEER, 1)
        assert last.steering["multiplier/drift"] >= 0
        told = {name: value for name, value in last.steering.items() if name.startswith("pool/")}
        wanted = {"pool/drift": last.candidate_drift.mean, "pool/drift:a": last.candidate_drift.slices["a"]}
        assert told == (pytest.approx(wanted, rel=1e-6) if pool else {})


def test_nothing_violated_nothing_done() -> None:
    """Infinite budgets: the bare run, bit for bit, and no draw."""
    world, twin = World(3), World(3)
    optimizer, bare = world.optimizer(Budget(drift=1e9)), torch.optim.Adam(twin.layer.parameters(), lr=0.1)
    for _ in range(5):
        record = world.step(optimizer)
        assert (record.action, record.audits, record.steering) == (Action.COMMIT, 1, {})
        bare.zero_grad()
        twin.loss().backward()
        bare.step()
    for p, q in zip(world.layer.parameters(), twin.layer.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_the_control_set_does_not_see_goes_on_moving() -> None:
    """Two parameters, of which the control set reads one: at the cap the other one keeps its whole step."""
    seen, unseen = nn.Parameter(torch.zeros(2, dtype=torch.float64)), nn.Parameter(torch.zeros(2, dtype=torch.float64))
    kl = PolicyKL(
        lambda: torch.distributions.Normal(seen, 1.0),
        noise_floor=False,
        pool=lambda: torch.distributions.Normal(seen, 1.0),
    )
    optimizer = STEPOptimizer(
        torch.optim.SGD([seen, unseen], lr=0.1), kl=kl, budget=Budget(drift=0.01), controller=Steer()
    )
    for _ in range(10):
        seen.grad, unseen.grad = torch.full_like(seen, -1.0), torch.full_like(unseen, -1.0)
        optimizer.step()
        assert optimizer.last.action is not Action.REJECT
    torch.testing.assert_close(unseen.detach(), torch.full_like(unseen, 1.0))
    assert optimizer.last.reference_drift.mean <= 0.01


def test_shrinking_the_budget_shrinks_the_step() -> None:
    """From the same state, the movement that is committed grows with the budget."""
    moved = []
    for cap in (1e-4, 1e-3, 1e-2, 0.1):
        world = World(5, categorical=False)
        moved.append(world.step(world.optimizer(Budget(mean=cap), lr=1.0)).accepted.mean)
    assert moved == sorted(moved)


@pytest.mark.parametrize("controller", [Steer(), Interpolate(), Gate()])
def test_back_under_a_cap_that_was_lowered(controller) -> None:
    """Less drift than before is progress where the cap is exceeded already; the record says so."""
    world = World(1)
    optimizer = world.optimizer(Budget(mean=math.inf), controller, lr=0.3, kind=torch.optim.SGD)
    for _ in range(10):
        world.step(optimizer)
    far = optimizer.last.reference_drift.mean
    optimizer.set_budget(Budget(drift=far / 10))
    start = copy.deepcopy(world.layer.state_dict())
    with torch.no_grad():
        home = World(1).layer(INPUTS)
    drifts = [far]
    for _ in range(20):
        optimizer.zero_grad()
        (world.layer(INPUTS) - home).square().mean().backward()
        optimizer.step()
        record = optimizer.last
        if record.action is not Action.REJECT:
            assert record.reference_drift.mean < drifts[-1] or record.reference_drift.mean <= far / 10
        assert record.exceeded_before == (("drift",) if drifts[-1] > far / 10 else ())
        drifts.append(record.reference_drift.mean)
    assert drifts[-1] < 0.5 * far
    assert start.keys() == world.layer.state_dict().keys()


@pytest.mark.filterwarnings("ignore:PolicyKL has no pool")
def test_remembered_models_serve_another_cap() -> None:
    """They know the KL, not the budget: after `set_budget` corrections aim at the new cap, and come back to it soon."""
    world = World(2, categorical=False, pool=False)
    optimizer = world.optimizer(Budget(drift=0.01), lr=0.05)
    for cap, steps in ((0.01, 15), (0.04, 15), (0.01, 6)):
        optimizer.set_budget(Budget(drift=cap))
        records = [world.step(optimizer) for _ in range(steps)]
        drifts = [record.reference_drift.mean for record in records]
        assert 0.5 * cap < drifts[-1] <= cap
        assert records[-1].exceeded_before == ()
        assert all(drift <= cap or drift < before for before, drift in zip([math.inf, *drifts], drifts, strict=False))


def test_the_same_run_twice_and_in_two_parts() -> None:
    """Draws and models are part of a checkpoint: a resumed run is the same run, bit for bit."""

    def run(world: World, optimizer: STEPOptimizer, steps: int) -> list[dict]:
        records = []
        for _ in range(steps):
            plain = world.step(optimizer).to_dict()
            records.append({k: v for k, v in plain.items() if k != "seconds"})
        return records

    whole = World(7)
    wanted = run(whole, whole.optimizer(Budget(drift=0.01, drift_slices={"a": 0.008})), 10)
    first = World(7)
    optimizer = first.optimizer(Budget(drift=0.01, drift_slices={"a": 0.008}))
    begun = run(first, optimizer, 5)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "layer": first.layer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = World(7)
    resumed = second.optimizer(Budget(drift=0.01, drift_slices={"a": 0.008}))
    second.layer.load_state_dict(saved["layer"])
    resumed.load_state_dict(saved["optimizer"])
    assert begun + run(second, resumed, 5) == wanted
    for p, q in zip(whole.layer.parameters(), second.layer.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_without_a_pool_is_refused() -> None:
    """What pi_ref says on the pool is not known any more."""
    world = World(0, pool=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = world.optimizer(Budget(drift=0.01))
    world.step(optimizer)
    other = World(0)
    with pytest.raises(ValueError, match="without pool="):
        other.optimizer(Budget(drift=0.01)).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "damage",
    [{"cuts": [{"name": "drift"}]}, {"turn": "x"}, {"cuts": [{"name": "drift", "normal": [1], "offset": 0.0}]}],
)
def test_a_damaged_memory_is_refused(damage) -> None:
    """Before anything has changed."""
    world = World(0)
    optimizer = world.optimizer(Budget(drift=0.01))
    world.step(optimizer)
    state = optimizer.state_dict()
    state["step_optim"]["controller"] |= damage
    with pytest.raises(ValueError, match="damaged"):
        World(0).optimizer(Budget(drift=0.01)).load_state_dict(state)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("aim", 0.0),
        ("aim", 1.1),
        ("far", 1.0),
        ("corrections", 0),
        ("trials", 0),
        ("prompts", 0),
        ("average", -0.1),
        ("average", 1.0),
        ("on_reject", "x"),
        ("on_shrink", "x"),
    ],
)
def test_bad_options_are_refused(option, value) -> None:
    """At construction, by name and value."""
    with pytest.raises(ValueError, match=f"{option}="):
        Steer(**{option: value})


def test_without_a_pool_it_says_what_that_costs() -> None:
    """At construction; not where no cap is set."""
    world = World(0, pool=False)
    with pytest.warns(UserWarning, match="PolicyKL has no pool: Steer takes its directions from the control set"):
        world.optimizer(Budget(drift=0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.optimizer(Budget(mean=0.01))


def test_a_pool_that_is_smaller_than_the_control_set_is_told_of() -> None:
    """At construction, under a cap; one of the same size is not."""
    world = World(0)
    few, many = INPUTS[: len(INPUTS) - 1] + 1, INPUTS + 1
    for inputs, budget, told in ((few, Budget(drift=0.01), 1), (many, Budget(drift=0.01), 0), (few, Budget(0.01), 0)):
        world.kl = PolicyKL(
            lambda: world.layer(INPUTS), noise_floor=False, pool=lambda inputs=inputs: world.layer(inputs)
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            world.optimizer(budget)
        assert len([w for w in caught if f"the pool has {len(few)} prompts, fewer than" in str(w.message)]) == told


def test_a_pool_needs_the_slices_that_are_limited() -> None:
    """There would be no direction for the others."""
    world = World(0)
    pool = PolicyKL(lambda: world.layer(INPUTS + 1), {"a": [0]}, noise_floor=False)
    world.kl = PolicyKL(lambda: world.layer(INPUTS), SLICES, noise_floor=False, pool=pool)
    with pytest.raises(ValueError, match="the budget limits slice 'b', of which the pool has no prompts"):
        world.optimizer(Budget(drift_slices={"b": 0.1}))
    world.optimizer(Budget(drift_slices={"a": 0.1}))


def test_a_function_with_a_graph_is_followed_and_another_is_shrunk() -> None:
    """Tensors with a graph have gradients; numbers do not."""
    for differentiable in (True, False):
        weight = nn.Parameter(torch.tensor([0.0, 0.0], dtype=torch.float64))

        def kl(weight=weight, differentiable=differentiable):
            value = weight[0].square()
            return value if differentiable else float(value.detach())

        optimizer = STEPOptimizer(torch.optim.SGD([weight], lr=1.0), kl=kl, budget=0.01, controller=Steer())
        weight.grad = torch.tensor([-1.0, -1.0], dtype=torch.float64)
        optimizer.step()
        assert optimizer.last.accepted.mean <= 0.01
        if differentiable:
            assert optimizer.last.action is Action.STEER
            assert weight[1] == 1.0  # what is not measured keeps its step
        else:
            assert optimizer.last.action is Action.SHRINK
            assert weight[1] == weight[0]


def test_a_candidate_that_is_not_finite_is_shrunk_or_rejected() -> None:
    """There are no gradients of it."""
    world = World(2)
    optimizer = world.optimizer(Budget(drift=0.01))
    optimizer.zero_grad()
    world.loss().backward()
    world.layer.weight.grad[0, 0] = math.inf
    before = copy.deepcopy(world.layer.state_dict())
    optimizer.step()
    assert optimizer.last.action is Action.REJECT
    assert all(torch.equal(before[name], value) for name, value in world.layer.state_dict().items())


@pytest.mark.parametrize("controller", [Steer(), Interpolate(), Gate()])
def test_progress_is_told(controller) -> None:
    """Of every controller: 1 after a commit, 0 after a rejection; the summary has the mean."""
    world = World(4)
    optimizer = world.optimizer(Budget(mean=0.002), controller, lr=0.05)
    records = [world.step(optimizer) for _ in range(10)]
    for record in records:
        if record.action is Action.COMMIT:
            assert record.progress == 1.0
        elif record.action is Action.REJECT:
            assert record.progress == 0.0
        else:
            assert 0 < record.progress <= 1
    shown = optimizer.summary()["mean_progress"]
    assert shown == pytest.approx(sum(record.progress for record in records) / len(records))


def test_progress_is_the_share_of_the_descent() -> None:
    """-<g, x - theta_t> over -<g, candidate - theta_t>, by hand."""
    world = World(6)
    optimizer = world.optimizer(Budget(drift=0.002), lr=0.3)
    world.step(optimizer)
    before = [p.detach().clone() for p in world.layer.parameters()]
    state = copy.deepcopy(optimizer.optimizer.state_dict())
    record = world.step(optimizer)
    gradients = [p.grad.clone() for p in world.layer.parameters()]
    after = [p.detach().clone() for p in world.layer.parameters()]
    with torch.no_grad():
        for p, b in zip(world.layer.parameters(), before, strict=True):
            p.copy_(b)
    bare = torch.optim.Adam(world.layer.parameters(), lr=0.3)
    bare.load_state_dict(state)
    bare.step()
    candidate = [p.detach() for p in world.layer.parameters()]

    def descent(points):
        return -sum(float((g * (x - b)).sum()) for g, x, b in zip(gradients, points, before, strict=True))

    assert record.action is Action.STEER
    assert record.progress == pytest.approx(descent(after) / descent(candidate), rel=1e-6)


def test_a_language_model_through_a_window_and_keep_state() -> None:
    """Several inner steps as one candidate, LoRA or not: inside of the cap, with the state as it was asked for."""
    model = tiny_llama()
    control = ragged_control()
    kl = TokenKL(model, control, noise_floor=False, pool=control.select([0]).from_ids([[1, 2], [3]], [[4, 5], [6, 7]]))
    optimizer = STEPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=0.02),
        kl=kl,
        budget=Budget(drift=0.02),
        controller=Steer(on_reject="keep_state", on_shrink="restore"),
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    for _ in range(4):
        with optimizer.window():
            for _ in range(2):
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
        record = optimizer.last
        assert record.reference_drift.mean <= 0.02
        assert record.action in (Action.STEER, Action.COMMIT)
    assert record.progress == record.alpha_realised
