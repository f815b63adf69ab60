"""The pull: a share of the caps' gradients in the inner step, and nowhere else."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from step_optim import Budget, PolicyKL, Steer, STEPOptimizer
from step_optim.controllers.pull import FIRST, LEAST, MOST, NEAR, RATE, next_shares
from step_optim.step.pulled import Pulled
from tests.controllers.test_steer import INPUTS, SLICES, World

CAP = 0.02

SHARES = st.dictionaries(st.sampled_from(["drift", "drift:a", "drift:b"]), st.floats(LEAST, 1.0))
RATIOS = st.dictionaries(
    st.sampled_from(["mean", "slice:a", "drift", "drift:a", "drift:b"]), st.one_of(st.floats(0, 1e3), st.just(math.nan))
)


@given(SHARES, RATIOS, st.floats(0.1, 1.0))
def test_shares_are_bounded_and_follow_the_candidate(shares, ratios, aim) -> None:
    """Together at most 1; raised beyond the aim, lowered below it; never of a budget on the step."""
    found = next_shares(shares, ratios, aim)
    assert sum(found.values()) <= 1 + 1e-12
    assert all(name.startswith("drift") and share > 0 for name, share in found.items())
    alone = {
        name: next_shares({name: share}, {name: ratios[name]}, aim) for name, share in shares.items() if name in ratios
    }
    for name, share in shares.items():
        if name not in ratios or math.isnan(ratios[name]):
            continue
        after = alone[name].get(name, 0.0)
        assert (
            after >= min(1.0, share) * (1 - 1e-12) if ratios[name] >= aim else after <= max(share, LEAST) * (1 + 1e-12)
        )
        assert after <= share * MOST**RATE * (1 + 1e-12)


def test_a_share_begins_near_the_cap_and_ends_far_from_it() -> None:
    assert next_shares({}, {"drift": NEAR}, 0.9) == {}
    shares = next_shares({}, {"drift": 1.01 * NEAR}, 0.9)
    assert shares == {"drift": FIRST}
    for _ in range(200):
        shares = next_shares(shares, {"drift": 0.1}, 0.9)
    assert shares == {}


def test_nothing_near_the_cap_changes_nothing() -> None:
    """A cap that is never near: the same bits as without the pull."""
    worlds = [World(1), World(1)]
    pulled, plain = (w.optimizer(Budget(drift=1e9), Steer(pull=p)) for w, p in zip(worlds, (True, False), strict=True))
    for _ in range(5):
        worlds[0].step(pulled), worlds[1].step(plain)
    assert pulled.last.pull == {}
    assert all(
        torch.equal(a, b) for a, b in zip(worlds[0].layer.parameters(), worlds[1].layer.parameters(), strict=True)
    )


def oracle_direction(
    world: World, draw: tuple[int, ...], inputs: torch.Tensor, origin: nn.Linear
) -> list[torch.Tensor]:
    """Gradient of the drift on some rows of the pool, by autograd in float64."""
    now = torch.distributions.Categorical(logits=world.layer(inputs[list(draw)]))
    then = torch.distributions.Categorical(logits=origin(inputs[list(draw)]).detach())
    return list(torch.autograd.grad(torch.distributions.kl_divergence(now, then).mean(), world.layer.parameters()))


def test_the_inner_step_sees_the_sum_and_the_loop_its_own_gradient() -> None:
    """SGD moves along g + ‖g‖ s n / ‖n‖; `.grad` is the loop's own object with its own bits afterwards."""
    world = World(3)
    origin = copy.deepcopy(world.layer)
    pool = torch.randn(9, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    source = PolicyKL(lambda: world.layer(pool), noise_floor=False)
    world.kl = PolicyKL(lambda: world.layer(INPUTS), SLICES, noise_floor=False, pool=source)
    optimizer = world.optimizer(Budget(drift=1e3), Steer(pull=True), lr=0.1, kind=torch.optim.SGD)
    world.step(optimizer)
    optimizer._run.memory["pull"] = {"drift": 0.7}
    optimizer.zero_grad()
    world.loss().backward()
    gradients = [p.grad for p in world.layer.parameters()]
    bits = [g.clone() for g in gradients]
    before = [p.detach().clone() for p in world.layer.parameters()]
    draw = world.kl.draw(4, 1, ["drift"])
    normal = oracle_direction(world, draw.prompts, pool, origin)
    optimizer.step()
    length, across = (math.sqrt(sum(float(part.square().sum()) for part in parts)) for parts in (bits, normal))
    for p, old, g, n in zip(world.layer.parameters(), before, bits, normal, strict=True):
        torch.testing.assert_close(old - p.detach(), 0.1 * (g + 0.7 * length / across * n), rtol=1e-9, atol=1e-12)
    assert all(p.grad is g for p, g in zip(world.layer.parameters(), gradients, strict=True))
    assert all(torch.equal(g, b) for g, b in zip(gradients, bits, strict=True))
    assert optimizer.last.pull == {"drift": 0.7}


@pytest.mark.parametrize("to_none", [True, False])
def test_a_loss_closure_is_pulled_at_every_call(to_none: bool) -> None:
    """The closure's gradients get the same direction each time, and keep nothing of it."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    own, direction = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    seen = []

    def closure() -> torch.Tensor:
        if weight.grad is not None and not to_none:
            weight.grad.zero_()
        elif to_none:
            weight.grad = None
        loss = 0.5 * weight.square().sum()
        loss.backward()
        seen.append(weight.grad.clone())
        return loss

    with Pulled({}, [(weight, 2.0 * direction)]).during((closure,), {}) as (args, kwargs):
        for _ in range(3):
            assert args[0]() == 12.5
            assert torch.equal(weight.grad, own + 10.0 * direction)
    assert kwargs == {}
    assert len(seen) == 3
    assert all(torch.equal(gradient, own) for gradient in seen)
    assert torch.equal(weight.grad, own)


def test_only_what_has_a_gradient_is_pulled() -> None:
    """A parameter without a gradient stays without one; gradients that are not finite, or 0, are left alone."""
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for gradient in (torch.ones(1), torch.zeros(1), torch.tensor([math.inf])):
        a.grad = gradient
        with Pulled({}, [(a, torch.ones(1)), (b, torch.ones(1))]).during((), {}):
            torch.testing.assert_close(a.grad, torch.tensor([2.0]) if gradient == 1 else gradient)
            assert b.grad is None
        assert a.grad is gradient


def test_a_sparse_gradient_is_refused_and_nothing_moves() -> None:
    layer = nn.Embedding(6, 3, sparse=True)
    rows = torch.arange(6)
    kl = PolicyKL(lambda: layer(rows), noise_floor=False)
    with pytest.warns(UserWarning, match="pool"):
        optimizer = STEPOptimizer(
            torch.optim.SGD(layer.parameters(), lr=0.1), kl=kl, budget=Budget(drift=1.0), controller=Steer(pull=True)
        )
    layer(rows[:2]).square().sum().backward()
    optimizer.step()
    optimizer._run.memory["pull"] = {"drift": 0.5}
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"sparse.*pull=False"):
        optimizer.step()
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad.is_sparse


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), lr=st.sampled_from([0.01, 0.1, 1.0]), cap=st.floats(1e-3, 0.3))
def test_the_caps_hold_with_the_pull(seed, lr, cap) -> None:
    world = World(seed)
    optimizer = world.optimizer(Budget(drift=cap, drift_slices={"a": cap}), Steer(pull=True), lr=lr)
    for _ in range(12):
        record = world.step(optimizer)
        assert record.reference_drift.mean <= cap
        assert record.reference_drift.slices["a"] <= cap
        assert sum(record.pull.values()) <= 1 + 1e-12


def test_no_overshoot() -> None:
    """A constant push against the cap: once pulled, proposals settle around the cap and not far below it or beyond.

    The policy's drift never falls back below a tenth of the cap: a multiplier
    that has wound itself up would drag it to pi_ref, and let go.
    """
    world = World(5, categorical=False)
    optimizer = world.optimizer(Budget(drift=CAP), Steer(pull=True), lr=0.02)
    records = [world.step(optimizer) for _ in range(150)]
    reached = next(i for i, record in enumerate(records) if record.reference_drift.mean > 0.8 * CAP)
    later = records[reached:]
    assert min(record.reference_drift.mean for record in later) > 0.1 * CAP
    assert all(str(record.action) != "reject" for record in later)
    assert any(record.pull for record in later)


def test_a_failed_step_takes_the_pull_back(monkeypatch) -> None:
    """An error after the inner step: weights, gradients and shares are as before, and the same step follows."""
    world, twin = World(4), World(4)
    optimizer, other = (w.optimizer(Budget(drift=CAP), Steer(pull=True)) for w in (world, twin))
    for _ in range(4):
        world.step(optimizer), twin.step(other)
    optimizer.zero_grad()
    world.loss().backward()
    shares = dict(optimizer.state_dict()["step_optim"]["controller"]["pull"])
    weights = [p.detach().clone() for p in world.layer.parameters()]
    gradients = [(p.grad, p.grad.clone()) for p in world.layer.parameters()]

    def fail(*_: object) -> None:
        raise RuntimeError("in between")

    with monkeypatch.context() as patched:
        patched.setattr(Steer, "saw", fail)
        with pytest.raises(RuntimeError, match="in between"):
            optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(world.layer.parameters(), weights, strict=True))
    for p, (gradient, bits) in zip(world.layer.parameters(), gradients, strict=True):
        assert p.grad is gradient
        assert torch.equal(gradient, bits)
    assert optimizer.state_dict()["step_optim"]["controller"]["pull"] == shares != {}
    optimizer._run.progress = other._run.progress  # the failed step was counted
    optimizer.step(), twin.step(other)
    assert all(torch.equal(a, b) for a, b in zip(world.layer.parameters(), twin.layer.parameters(), strict=True))


def test_a_resumed_run_goes_on_to_the_bit(tmp_path) -> None:
    def start() -> tuple[World, STEPOptimizer]:
        world = World(11)
        return world, world.optimizer(Budget(drift=CAP), Steer(pull=True), lr=0.1)

    world, optimizer = start()
    for _ in range(6):
        world.step(optimizer)
    torch.save({"weights": world.layer.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    for _ in range(6):
        world.step(optimizer)
    other, resumed = start()
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.layer.load_state_dict(saved["weights"])
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(6):
        other.step(resumed)
    assert resumed.last.pull == optimizer.last.pull != {}
    assert all(torch.equal(a, b) for a, b in zip(world.layer.parameters(), other.layer.parameters(), strict=True))


def test_pull_is_refused_where_it_would_do_nothing() -> None:
    """Without a cap there is nothing to pull to."""
    world = World(0)
    with pytest.raises(ValueError, match=r"pull=True.*Budget\(drift="):
        world.optimizer(Budget(mean=0.1), Steer(pull=True))
    optimizer = world.optimizer(Budget(drift=0.1), Steer(pull=True))
    with pytest.raises(ValueError, match=r"pull=True.*Budget\(drift="):
        optimizer.set_budget(Budget(mean=0.1))


def test_a_line_search_is_refused() -> None:
    """It compares losses, which the pull is no part of."""
    world = World(0)
    inner = torch.optim.LBFGS(world.layer.parameters(), line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match=r"line search of LBFGS.*pull=False"):
        STEPOptimizer(inner, kl=world.kl, budget=Budget(drift=0.1), controller=Steer(pull=True))


def test_in_a_window_every_inner_step_is_pulled() -> None:
    world = World(2)
    optimizer = world.optimizer(Budget(drift=CAP), Steer(pull=True), lr=0.05)
    for _ in range(5):
        with optimizer.window():
            for _ in range(3):
                optimizer.zero_grad()
                world.loss().backward()
                optimizer.step()
        assert optimizer.last.reference_drift.mean <= CAP
    assert optimizer.last.pull
    assert optimizer.summary()["pull_rate"] > 0


class Clears(torch.optim.SGD):
    """Clears gradients itself, in one of the ways that optimizers have."""

    def __init__(self, params, lr: float, *, to_none: bool) -> None:
        super().__init__(params, lr)
        self.to_none = to_none

    def step(self, closure=None):
        super().step()
        self.zero_grad(set_to_none=self.to_none)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_the_inner_optimizer_clears_stay_cleared(to_none: bool) -> None:
    """A loop that never calls zero_grad itself, because the optimizer does: nothing of a step is in the next one."""
    world = World(1)
    inner = Clears(world.layer.parameters(), 0.1, to_none=to_none)
    optimizer = STEPOptimizer(inner, kl=world.kl, budget=Budget(drift=CAP), controller=Steer(pull=True))
    for _ in range(8):
        world.loss().backward()
        fresh = torch.autograd.grad(world.loss(), list(world.layer.parameters()))
        for p, g in zip(world.layer.parameters(), fresh, strict=True):
            torch.testing.assert_close(p.grad, g)
        optimizer.step()
        assert all(p.grad is None or not p.grad.any() for p in world.layer.parameters())
    assert optimizer.last.pull


def test_a_closure_that_finds_cleared_gradients_does_not_get_old_ones_back() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    seen = []

    def closure() -> None:
        (0.5 * weight.square().sum()).backward()
        seen.append(weight.grad.clone())

    with Pulled({}, [(weight, torch.ones(2))]).during((closure,), {}) as (args, _):
        args[0]()
        weight.grad = None  # as a first_step(zero_grad=True) does
        args[0]()
    assert all(torch.equal(gradient, torch.tensor([3.0, 4.0])) for gradient in seen)


def test_the_length_is_that_of_what_the_policy_reads() -> None:
    """A value head with a thousand times the gradient does not make the pull a thousand times as strong."""
    moved = []
    for scale in (0.0, 1e3):
        world = World(2)
        critic = nn.Linear(4, 1, dtype=torch.float64)
        inner = torch.optim.SGD([*world.layer.parameters(), *critic.parameters()], lr=0.1)
        optimizer = STEPOptimizer(inner, kl=world.kl, budget=Budget(drift=1.0), controller=Steer(pull=True))
        world.step(optimizer)
        optimizer._run.memory["pull"] = {"drift": 1.0}
        optimizer.zero_grad()
        (world.loss() + scale * critic(INPUTS).mean()).backward()
        optimizer.step()
        assert optimizer.last.pull == {"drift": 1.0}
        moved.append([p.detach().clone() for p in world.layer.parameters()])
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b)


def test_shares_of_caps_that_are_gone_do_not_pull() -> None:
    """Another budget or another closure: caps that this step does not have are left out, and nothing fails."""
    world = World(3)
    optimizer = world.optimizer(Budget(drift_slices={"a": CAP}), Steer(pull=True))
    for _ in range(5):
        world.step(optimizer)
    assert list(optimizer.last.pull) == ["drift:a"]
    optimizer.set_budget(Budget(drift=100.0))
    world.step(optimizer)
    assert optimizer.last.pull == {}

    plain = PolicyKL(lambda: world.layer(INPUTS), noise_floor=False)
    saved = optimizer.state_dict()
    saved["step_optim"]["controller"]["pull"] = {"drift:a": 0.5}
    saved["step_optim"]["kl"] = {}
    with pytest.warns(UserWarning, match="pool"):
        resumed = STEPOptimizer(
            torch.optim.Adam(world.layer.parameters()), kl=plain, budget=Budget(drift=1.0), controller=Steer(pull=True)
        )
    resumed.load_state_dict(saved)
    resumed.zero_grad()
    world.loss().backward()
    resumed.step()
    assert resumed.last.pull == {}


def test_every_capped_slice_is_drawn() -> None:
    """Also a small one of a large pool, by the pull and by corrections."""
    layer = nn.Linear(4, 3)
    rows = torch.randn(60, 4)
    members = {"rare": [0, 1], **{f"s{i}": range(2 + 8 * i, 10 + 8 * i) for i in range(7)}}
    pool = PolicyKL(lambda: layer(rows), members, noise_floor=False)
    kl = PolicyKL(lambda: layer(rows + 1), members, noise_floor=False, pool=pool)
    for turn in range(40):
        draw = kl.draw(4, turn, [f"drift:{name}" for name in members])
        assert all(set(draw.prompts) & set(part) for part in members.values())


def test_a_lowered_cap_pulls_with_all_its_might() -> None:
    """Far beyond the cap as it is set, the share rises, though the step only has to come back a little."""
    world = World(4)
    optimizer = world.optimizer(Budget(drift=0.3), Steer(pull=True), lr=0.05)
    for _ in range(12):
        world.step(optimizer)
    optimizer.set_budget(Budget(drift=0.003))
    shares = [world.step(optimizer) and optimizer._run.memory["pull"]["drift"] for _ in range(4)]
    assert all(b > a or b == 1 for a, b in itertools.pairwise(shares))


def test_a_candidate_that_is_not_finite_says_nothing() -> None:
    world = World(5)
    optimizer = world.optimizer(Budget(drift=CAP), Steer(pull=True))
    for _ in range(5):
        world.step(optimizer)
    before = dict(optimizer._run.memory["pull"])
    optimizer.zero_grad()
    (world.loss() * math.inf).backward()
    optimizer.step()
    assert optimizer._run.memory["pull"] == before != {}


def test_frozen_policies_are_not_pulled() -> None:
    """While a value head is trained alone."""
    world = World(6)
    critic = nn.Linear(4, 1, dtype=torch.float64)
    inner = torch.optim.SGD([*world.layer.parameters(), *critic.parameters()], lr=0.1)
    optimizer = STEPOptimizer(inner, kl=world.kl, budget=Budget(drift=1e-3), controller=Steer(pull=True))
    for _ in range(4):
        world.step(optimizer)
    assert optimizer.last.pull
    world.layer.requires_grad_(False)
    optimizer.zero_grad()
    critic(INPUTS).mean().backward()
    optimizer.step()
    assert optimizer.last.pull == {}


@pytest.mark.parametrize("on_error", ["raise", "reject"])
def test_errors_of_the_pull_are_those_of_audits(on_error: str) -> None:
    world = World(7)
    broken = []

    def rows() -> torch.Tensor:
        if broken:
            raise OSError("gone")
        return world.layer(INPUTS + 1)

    kl = PolicyKL(lambda: world.layer(INPUTS), pool=PolicyKL(rows, noise_floor=False), noise_floor=False)
    optimizer = STEPOptimizer(
        torch.optim.SGD(world.layer.parameters(), lr=0.1),
        kl=kl,
        budget=Budget(drift=CAP),
        controller=Steer(pull=True),
        on_error=on_error,
    )
    for _ in range(6):
        world.step(optimizer)
    assert optimizer.last.pull
    broken.append(True)
    before = [p.detach().clone() for p in world.layer.parameters()]
    if on_error == "raise":
        with pytest.raises(OSError, match="gone"):
            world.step(optimizer)
    else:
        world.step(optimizer)
        assert "gone" in optimizer.last.error
    assert all(torch.equal(a, b) for a, b in zip(world.layer.parameters(), before, strict=True))


def test_gradients_keep_their_graph() -> None:
    """Second-order optimizers differentiate them once more."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    (gradient,) = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)
    weight.grad = gradient
    with Pulled({}, [(weight, torch.ones(2))]).during((), {}):
        (second,) = torch.autograd.grad(weight.grad.sum(), weight, retain_graph=True)
    torch.testing.assert_close(second, 6 * weight.detach())
    assert weight.grad is gradient


def test_half_precision_gradients_may_be_long() -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    weight.grad = torch.full((4,), 6e4, dtype=torch.float16)
    with Pulled({}, [(weight, torch.tensor([1e-3, 0.0, 0.0, 0.0]))]).during((), {}):
        assert weight.grad.isfinite().all()
        assert weight.grad[0] > weight.grad[1]


@pytest.mark.parametrize("share", [math.nan, -0.1, 2.0, 0.0])
def test_damaged_shares_are_refused(share: float) -> None:
    world = World(8)
    optimizer = world.optimizer(Budget(drift=CAP), Steer(pull=True))
    state = optimizer.state_dict()
    state["step_optim"]["controller"]["pull"] = {"drift": share}
    with pytest.raises(ValueError, match="damaged"):
        optimizer.load_state_dict(state)
