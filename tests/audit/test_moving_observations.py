"""Observations that move on: each update is measured on its own rollout, and drift restarts or is kept."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, kl_divergence

from step_optim import Action, Budget, Interpolate, PolicyKL, Project, Steer, STEPOptimizer
from step_optim.host.rng import RNGState
from step_optim.snapshot.tensors import same_bits
from tests import reference
from tests.models import nudge

WIDTH, ACTIONS = 3, 4


class Actor(nn.Module):
    """Observations [N, 3] -> logits or means [N, 4]; BatchNorm's statistics are part of the policy, dropout is not."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.norm, self.drop = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)
            self.head = nn.Linear(8, ACTIONS)
            self.log_std = nn.Parameter(torch.zeros(ACTIONS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.body(x)))))


KINDS: dict[str, Callable[[Actor, Tensor], Tensor | Distribution]] = {
    "logits": lambda actor, x: actor(x),
    "categorical": lambda actor, x: Categorical(logits=actor(x)),
    "normal": lambda actor, x: Independent(Normal(actor(x), actor.log_std.exp()), 1),
    "bernoulli": lambda actor, x: Independent(Bernoulli(logits=actor(x)), 1),
}


def rollout(count: int, seed: int) -> Tensor:
    """Observations [N, 3]."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def frozen(actor: Actor) -> Actor:
    """A float64 eval-mode copy."""
    return copy.deepcopy(actor).double().eval()


def exact(kind: str, new: Actor, old: Actor, x: Tensor) -> list[float]:
    """The oracle: KL(new ‖ old) of each observation, in float64 and by torch's own formulas."""
    with torch.no_grad():
        pair = [KINDS[kind](actor, x.double()) for actor in (new, old)]
    candidate, previous = (Categorical(logits=out) if isinstance(out, Tensor) else out for out in pair)
    return kl_divergence(candidate, previous).tolist()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def close(measured: float, wanted: float) -> None:
    assert measured == reference.near(wanted, rel=1e-4)


def update(actor: Actor, optimizer: STEPOptimizer, x: Tensor, inner: int = 2) -> None:
    """One window of some inner steps in train mode, as PPO makes it."""
    with optimizer.window():
        for _ in range(inner):
            actor.train()
            out = actor(x)
            optimizer.zero_grad()
            (out.square().mean() - out[:, 0].mean() + actor.log_std.sum()).backward()
            optimizer.step()


def wrapped(actor: Actor, kl: PolicyKL, lr: float = 0.05, **options: Any) -> STEPOptimizer:
    return STEPOptimizer(torch.optim.Adam(actor.parameters(), lr=lr), kl, **{"budget": 1e9} | options)


rollouts = st.lists(st.tuples(st.integers(2, 9), st.sampled_from(["restart", "keep", None])), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(plan=rollouts, budget=st.sampled_from([1e-3, 1e9]), seed=st.integers(0, 99))
def test_every_update_is_measured_on_its_own_rollout(kind, plan, budget, seed) -> None:
    """Movement, slices and drift equal the float64 oracle, whatever N is and whatever becomes of pi_ref."""
    actor = Actor(seed)
    x = rollout(5, seed)
    kl = PolicyKL(lambda seen: KINDS[kind](actor, seen), observations=x, drift="keep", model=actor)
    optimizer = wrapped(actor, kl, budget=budget)
    first = frozen(actor)
    for turn, (count, drift) in enumerate([(5, None), *plan]):
        if turn:
            x, members = rollout(count, seed + turn), {"a": [0], "b": list(range(1, count))}
            kl.observe(x, members, drift=drift)
            if drift == "restart":
                first = frozen(actor)
        previous = frozen(actor)
        update(actor, optimizer, x)
        record = optimizer.last
        now = frozen(actor)
        moved, drifted = exact(kind, now, previous, x), exact(kind, now, first, x)
        if record.action in (Action.COMMIT, Action.SHRINK):
            close(record.accepted.mean, mean(moved))
            assert record.accepted.mean <= budget
            for name, chosen in kl.members.items():
                close(record.accepted.slices[name], mean([moved[i] for i in chosen]))
        close(record.reference_drift.mean, mean(drifted))
        assert kl.prompts == count == len(record.candidate.prompts)


class Counted:
    """Counts calls, and the observations of each."""

    def __init__(self, actor: Actor) -> None:
        self.actor, self.seen = actor, list[int]()

    def __call__(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.actor(x)


@pytest.mark.parametrize(("drift", "forwards"), [("restart", 2), (None, 2), ("keep", 3)])
def test_a_renewal_costs_one_forward(drift, forwards) -> None:
    """The reference is one forward on the new observations; pi_ref one more where it is kept; none on the old ones."""
    actor = Actor()
    fn = Counted(actor)
    kl = PolicyKL(fn, observations=rollout(5, 0), drift=drift, model=actor)
    optimizer = wrapped(actor, kl)
    update(actor, optimizer, rollout(5, 0))
    for count in (7, 4, 4):
        x = rollout(count, count)
        fn.seen.clear()
        kl.observe(x)
        assert not fn.seen
        update(actor, optimizer, x)
        assert fn.seen == [count] * forwards
        fn.seen.clear()
        update(actor, optimizer, x)  # not renewed: the audit that licensed the last one is the reference
        assert fn.seen == [count]


def test_a_step_costs_as_much_as_a_window() -> None:
    """One forward on the same rollout; two after a renewal, however often there was one since the last step."""
    policy = nn.Linear(WIDTH, ACTIONS)
    seen: list[int] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(len(x))
        return policy(x)

    kl = PolicyKL(fn, observations=rollout(5, 0))
    optimizer = STEPOptimizer(torch.optim.SGD(policy.parameters(), lr=0.1), kl, budget=1e9)
    for renewals, wanted in [(1, 2), (0, 1), (3, 2), (0, 1)]:
        for turn in range(renewals):
            kl.observe(rollout(3 + turn, turn))
        seen.clear()
        policy(rollout(4, 1)).square().mean().backward()
        optimizer.step()
        assert len(seen) == wanted


def test_observations_are_nested_and_copied() -> None:
    """Dicts, tuples and arrays; a rollout's storage may be written again without a trace."""

    class Seen(NamedTuple):
        state: Any
        mask: Any

    policy = nn.Linear(WIDTH, ACTIONS)

    def fn(seen: Any) -> Tensor:
        assert isinstance(seen["pair"], Seen)
        return policy(seen["x"]["deep"] + seen["pair"].state[0]).masked_fill(~seen["pair"].mask, -torch.inf)

    def storage(count: int) -> dict[str, Any]:
        mask = np.ones((count, ACTIONS), dtype=bool)
        mask[0, 1:3] = False
        return {"x": {"deep": rollout(count, 1)}, "pair": Seen([np.ones((count, 1), dtype=np.float32)], mask)}

    first = storage(5)
    kl, twin = PolicyKL(fn, observations=first), PolicyKL(fn, observations=storage(5))
    first["x"]["deep"].zero_()
    first["pair"].state[0][:] = 0
    kl.anchor()
    twin.anchor()
    nudge(policy, 0.1, 1)
    assert kl() == twin()
    assert kl().mean > 0
    second = storage(6)
    kl.observe(second)
    kl.anchor()
    second["pair"].mask[:] = True
    assert kl().mean == 0


@pytest.mark.parametrize(
    ("observations", "error", "match"),
    [
        ({"x": "text"}, TypeError, r"observations\['x'\]='text' is no tensor"),
        ([torch.ones(3, 3), None], TypeError, r"observations\[1\]=None"),
        (np.array(["a", "b"]), TypeError, "torch cannot read"),
        ({}, ValueError, "no tensor in it"),
        (torch.tensor(1.0), ValueError, "first dimension"),
        (torch.zeros(0, 3), ValueError, "at least one"),
        ({"a": torch.zeros(3, 3), "b": torch.zeros(2, 3)}, ValueError, r"observations\['b'\] has 2 observations"),
        (torch.zeros(2, 3, 3), ValueError, "logits of shape"),
    ],
)
def test_bad_observations_are_refused(observations, error, match) -> None:
    """When the closure is made; and in observe, where nothing has changed then."""
    policy = nn.Linear(WIDTH, ACTIONS)
    with pytest.raises(error, match=match):
        PolicyKL(policy, observations=observations)
    if "logits" in match:
        return
    kl = PolicyKL(policy, observations=rollout(4, 0), slices={"a": [3]})
    kl.anchor()
    nudge(policy, 0.1, 0)
    before = kl()
    with pytest.raises(error, match=match):
        kl.observe(observations)
    with pytest.raises(ValueError, match="slice"):
        kl.observe(rollout(3, 0), {"a": [3]})
    assert kl() == before


def test_bad_arguments_are_refused() -> None:
    """Each by its name, with what to do instead."""
    policy, bare = nn.Linear(WIDTH, ACTIONS), nn.Parameter(torch.zeros(ACTIONS))
    x = rollout(4, 0)
    with pytest.raises(ValueError, match="drift='stay' is unknown"):
        PolicyKL(policy, observations=x, drift="stay")
    with pytest.raises(ValueError, match="give observations="):
        PolicyKL(lambda: policy(x), drift="keep")
    with pytest.raises(ValueError, match="returned 8 observations for the 4"):
        PolicyKL(lambda seen: policy(seen.repeat(2, 1)), observations=x)
    with pytest.raises(ValueError, match="none of the modules that it calls"):
        PolicyKL(lambda seen: policy(seen) + bare, observations=x, drift="keep")
    with pytest.raises(ValueError, match="mask= is fixed"):
        flags = torch.ones(4, 2, dtype=torch.bool)
        PolicyKL(lambda seen: policy(seen)[:, None].expand(4, 2, 4), observations=x, reduction="mean", mask=flags)
    with pytest.raises(TypeError, match="give pool=PolicyKL"):
        PolicyKL(policy, observations=x, pool=lambda: policy(x))
    pool = PolicyKL(policy, observations=x, noise_floor=False)
    with pytest.raises(ValueError, match="give both the same"):
        PolicyKL(policy, observations=x, pool=pool, drift="keep")
    with pytest.raises(TypeError, match="made without observations="):
        PolicyKL(lambda: policy(x)).observe(x)
    kl = PolicyKL(policy, observations=x)
    with pytest.raises(ValueError, match="the weights of pi_ref were not kept"):
        kl.observe(x, drift="keep")
    with pytest.raises(ValueError, match="drift='stay' is unknown"):
        kl.observe(x, drift="stay")
    kept = PolicyKL(policy, observations=x, drift="keep")
    with pytest.raises(ValueError, match="the weights without the adapter are not kept"):
        kept.take_origin()


def test_observations_stay_as_they_are_in_a_step() -> None:
    """Inside a window they cannot be renewed, nor those of the pool; after an error in it they can."""
    policy, x = nn.Linear(WIDTH, ACTIONS), rollout(4, 0)
    pool = PolicyKL(policy, observations=x, noise_floor=False)
    kl = PolicyKL(policy, observations=x, pool=pool)
    optimizer = STEPOptimizer(torch.optim.SGD(policy.parameters(), lr=0.1), kl, budget=1.0)
    for closure in (kl, pool):
        with pytest.raises(RuntimeError, match="observe\\(\\) inside a step"), optimizer.window():
            closure.observe(x)
    kl.observe(x)
    pool.observe(x)


def test_a_slice_that_the_budget_limits_has_to_be_there() -> None:
    """The step names it, and every further one until it is; nothing has moved then."""
    policy = nn.Linear(WIDTH, ACTIONS)
    kl = PolicyKL(policy, observations=rollout(6, 0), slices=["left", "right"] * 3)
    budget = Budget(mean=1.0, slices={"left": 0.1})
    optimizer = STEPOptimizer(torch.optim.SGD(policy.parameters(), lr=0.1), kl, budget=budget)
    before = policy.weight.detach().clone()
    kl.observe(rollout(4, 1), slices={"right": [0, 1]})
    policy(rollout(4, 1)).square().mean().backward()
    for _ in range(2):
        with pytest.raises(ValueError, match="left"):
            optimizer.step()
    assert same_bits(policy.weight, before)
    kl.observe(rollout(5, 2), slices={"left": [4], "right": [0], "new": [1]})
    optimizer.step()
    assert set(optimizer.last.candidate.slices) == {"left", "right", "new"}


def test_a_cap_that_begins_anew_is_told_once() -> None:
    """Unless somebody said so; a kept drift adds up over rollouts, a restarted one does not."""
    drifts: dict[Any, list[float]] = {}
    for drift in (None, "restart", "keep"):
        torch.manual_seed(0)  # of dropout
        actor = Actor()
        kl = PolicyKL(actor, observations=rollout(5, 0), drift=drift)
        optimizer = wrapped(actor, kl, budget=Budget(drift=10.0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for turn in range(4):
                kl.observe(rollout(5, turn))
                update(actor, optimizer, rollout(5, turn))
                drifts.setdefault(drift, []).append(optimizer.last.reference_drift.mean)
        told = [str(each.message) for each in caught if "begins anew" in str(each.message)]
        assert len(told) == (drift is None)
    assert drifts[None] == drifts["restart"]
    assert drifts["keep"][0] == drifts["restart"][0]
    assert drifts["keep"][-1] > 2 * drifts["restart"][-1]


@pytest.mark.parametrize("drift", ["restart", "keep"])
@pytest.mark.parametrize("kind", ["logits", "normal"])
def test_a_resumed_run_equals_the_uninterrupted_one(kind, drift) -> None:
    """Weights, records and drift, although it is made with the observations of another rollout."""

    def made(seed: int) -> tuple[Actor, PolicyKL, STEPOptimizer]:
        actor = Actor(seed)
        x = rollout(5, seed)
        kl = PolicyKL(lambda seen: KINDS[kind](actor, seen), observations=x, drift=drift, model=actor)
        return actor, kl, wrapped(actor, kl, budget=Budget(mean=1e-3, drift=0.5))

    def go(actor: Actor, kl: PolicyKL, optimizer: STEPOptimizer, turns: Sequence[int]) -> list[Any]:
        figures = []
        for turn in turns:
            x = rollout(4 + turn, turn)
            kl.observe(x)
            torch.manual_seed(turn)
            update(actor, optimizer, x)
            figures.append((optimizer.last.alpha, optimizer.last.accepted, optimizer.last.reference_drift))
        return figures

    actor, kl, optimizer = made(0)
    go(actor, kl, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"model": actor.state_dict(), "optimizer": optimizer.state_dict()}, file)
    wanted = go(actor, kl, optimizer, range(2, 5))
    other, other_kl, other_optimizer = made(7)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    assert go(other, other_kl, other_optimizer, range(2, 5)) == wanted
    assert all(same_bits(a, b) for a, b in zip(actor.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_that_keeps_pi_ref_in_another_way_is_refused() -> None:
    """Or lets the drift begin anew where that is what a renewal does; a damaged one is refused."""
    x = rollout(5, 0)

    def made(width: int = ACTIONS, **options: Any) -> PolicyKL:
        return PolicyKL(nn.Linear(WIDTH, width), noise_floor=False, **options)

    kept, restarted = made(observations=x, drift="keep"), made(observations=x)
    for kl in (kept, restarted):
        assert kl.state_dict() == {}
        kl.anchor()
    fresh = made(observations=x, drift="keep")
    with pytest.raises(ValueError, match="not kept in the same way"):
        fresh.load_state_dict(restarted.state_dict())
    with pytest.raises(ValueError, match="not those of"):
        made(6, observations=x, drift="keep").load_state_dict(kept.state_dict())
    damaged = kept.state_dict()
    damaged["weights"]["0"].fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        fresh.load_state_dict(damaged)
    assert not fresh.has_origin
    policy = nn.Linear(WIDTH, ACTIONS)
    with pytest.raises(ValueError, match="not kept in the same way"):
        PolicyKL(lambda: policy(x)).load_state_dict(kept.state_dict())
    same = made(observations=x)
    same.load_state_dict(restarted.state_dict())
    assert same.has_origin
    for state in (kept.state_dict(), restarted.state_dict()):
        other = made(observations=rollout(5, 1))
        other.load_state_dict(state)
        assert not other.has_origin


@pytest.mark.parametrize("drift", ["restart", "keep"])
def test_pool_and_held_out_move_on_too(drift) -> None:
    """All are measured from one pi_ref, whichever of them were renewed; Steer holds the cap on every rollout."""
    actor = Actor()
    options: dict[str, Any] = {"noise_floor": False, "drift": drift, "model": actor}
    pool = PolicyKL(actor, observations=rollout(9, 50), **options)
    held_out = PolicyKL(actor, observations=rollout(9, 60), **options)
    kl = PolicyKL(actor, observations=rollout(6, 0), pool=pool, held_out=held_out, every=1, **options)
    optimizer = wrapped(actor, kl, budget=Budget(drift=0.02), controller=Steer(), lr=0.02)
    first = frozen(actor)
    for turn in range(4):
        x, further = rollout(6 + turn, turn), rollout(8, 60 + turn)
        if turn:
            pool.observe(rollout(9 + turn, 50 + turn))
        if turn > 1:
            kl.observe(x)
            held_out.observe(further)
        if drift == "restart":
            first = frozen(actor)
        update(actor, optimizer, x)
        assert optimizer.last.action is not Action.REJECT
        now, x = frozen(actor), kl._observed.observations
        close(optimizer.last.reference_drift.mean, mean(exact("logits", now, first, x)))
        further = held_out._observed.observations
        close(optimizer.last.held_out_drift.mean, mean(exact("logits", now, first, further)))
        assert optimizer.last.reference_drift.mean <= 0.02
        with torch.no_grad():
            pi_ref = torch.tensor(exact("logits", first, now, pool._observed.observations))
        assert bool((pi_ref >= 0).all())
        assert pool._origin.x.shape[0] == pool.prompts


@pytest.mark.parametrize("controller", [Interpolate(), Project()])
def test_controllers_work_on_the_new_rollout(controller) -> None:
    """Every commit is within the budget by the oracle, and nothing of an audit reaches the random streams."""
    actor = Actor()
    kl = PolicyKL(actor, observations=rollout(5, 0))
    optimizer = wrapped(actor, kl, budget=1e-3, controller=controller)
    for turn in range(4):
        x = rollout(4 + 2 * turn, turn)
        stream = RNGState.capture()
        kl.observe(x)
        assert same_bits(RNGState.capture().torch_cpu, stream.torch_cpu)
        previous = frozen(actor)
        update(actor, optimizer, x)
        now = frozen(actor)
        assert mean(exact("logits", now, previous, x)) <= 1e-3 * (1 + 1e-4)
        assert optimizer.last.action is not Action.REJECT


def test_a_kept_pi_ref_leaves_no_trace() -> None:
    """Reading it writes no weight, buffer, flag or version."""
    actor = Actor().train()
    for options in ({"model": actor}, {}):
        kl = PolicyKL(actor, observations=rollout(5, 0), drift="keep", **options)
        kl.anchor()
        nudge(actor, 0.1, 3)
        actor.norm.running_mean.add_(1.0)
        before = {name: (t, t.clone(), t._version) for name, t in actor.state_dict(keep_vars=True).items()}
        kl.observe(rollout(6, 1))
        kl.anchor()
        assert kl.drift().mean > 0
        for name, t in actor.state_dict(keep_vars=True).items():
            assert t is before[name][0]
            assert same_bits(t, before[name][1])
            assert t._version == before[name][2]
        assert all(module.training for module in actor.modules())


class Experts(nn.Module):
    """Two networks; which one speaks is up to the observations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a if bool(x[0, 0] > 0) else self.b)(x)


@pytest.mark.parametrize("known", ["fn", "model", "nothing"])
def test_what_is_called_later_is_part_of_a_kept_pi_ref(known) -> None:
    """Its weights of that time are kept where the whole policy is known; where not, nobody could tell: refused."""
    policy, x = Experts(), torch.rand(5, 3)
    first = copy.deepcopy(policy)
    options = {"model": policy} if known == "model" else {}
    kl = PolicyKL(policy if known == "fn" else lambda seen: policy(seen), observations=x, drift="keep", **options)
    optimizer = STEPOptimizer(torch.optim.SGD(policy.parameters(), lr=0.1), kl, budget=Budget(mean=1.0, drift=10.0))
    for parameter in policy.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kl.observe(-x)
    if known == "nothing":
        with pytest.raises(ValueError, match=r"calls Linear, which it did not call .* PolicyKL\(fn, model=...\)"):
            optimizer.step()
        return
    optimizer.step()
    with torch.no_grad():
        now, then = (Categorical(logits=each(-x).double()) for each in (policy, first))
    assert optimizer.last.reference_drift.mean == pytest.approx(float(kl_divergence(now, then).mean()), rel=1e-4)
