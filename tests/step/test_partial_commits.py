"""Partial commits: what the KL closure does not read keeps its whole step, and the policy's budgets hold."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from step_optim import (
    Action,
    Budget,
    Controller,
    Gate,
    Interpolate,
    PolicyKL,
    Project,
    Steer,
    STEPOptimizer,
    read_log,
)
from step_optim.flight import read_flight
from step_optim.flight.visit import Visit
from step_optim.step.unread import culprits
from tests.faults.worlds import Follower
from tests.strategies import INNER, bits, budgets, controllers, picture, token_problem, wrap

STEPS = 4


class PPO:
    """An actor and a critic with losses of their own, from a seed."""

    def __init__(self, seed: int = 0, lr: float = 0.05) -> None:
        torch.manual_seed(seed)
        self.actor = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.observations, self.others = torch.randn(6, 4), torch.randn(8, 4)
        self.data = torch.randn(32, 7, 4)
        self.lr = lr

    @property
    def kl(self) -> PolicyKL:
        """Movement of the actor, with a pool."""
        actor, observations, others = self.actor, self.observations, self.others
        slices = {"a": [0, 1, 2], "b": [3, 4, 5]}
        pool = PolicyKL(lambda: actor(others), {"a": range(4), "b": range(4, 8)}, noise_floor=False)
        return PolicyKL(lambda: actor(observations), slices, noise_floor=False, pool=pool)

    def groups(self, one: bool) -> Any:
        """The parameters of both, in one group or in two."""
        actor, critic = list(self.actor.parameters()), list(self.critic.parameters())
        return [*actor, *critic] if one else [{"params": actor}, {"params": critic}]

    def backward(self, step: int, *, broken: str = "") -> None:
        """Gradients of the losses of both; those of a broken one have a NaN."""
        x = self.data[step % 32]
        for net in (self.actor, self.critic):
            net.zero_grad()
        (-self.actor(x).log_softmax(-1)[:, 0].mean()).backward()
        (self.critic(x)[:, 0] - x.sum(-1)).square().mean().backward()
        if broken:
            next(getattr(self, broken).parameters()).grad.view(-1)[0] = math.nan


Inner = Callable[[Any, float], torch.optim.Optimizer]


def step(optimizer: Any, backward: Callable[[int], None], index: int, window: bool) -> None:
    """One step; or a window of two."""
    if not window:
        backward(index)
        optimizer.step()
        return
    with optimizer.window():
        for part in range(2):
            backward(2 * index + part)
            optimizer.step()


def entries(optimizer: Any, network: nn.Module) -> Any:
    """What the optimizer's state has under a network's parameters."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return bits([inner.state.get(p, {}) for p in network.parameters()])


def two_runs(
    inner: Inner,
    controller: Controller,
    budget: Any,
    *,
    seed: int = 0,
    one: bool = False,
    window: bool = False,
    broken: int | None = None,
    resumed: int | None = None,
    **options: Any,
) -> STEPOptimizer:
    """The oracle: the actor's optimizer under STEP and the critic's bare one, beside one optimizer over both."""
    both, apart = PPO(seed), PPO(seed)
    optimizer = _wrapped(both, inner, controller, budget, one, **options)
    alone = STEPOptimizer(
        inner(list(apart.actor.parameters()), 0.05),
        kl=apart.kl,
        budget=budget,
        controller=copy.deepcopy(controller),
        **options,
    )
    bare = inner(list(apart.critic.parameters()), 0.05)
    for index in range(STEPS):
        if index == resumed:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = _wrapped(both, inner, controller, budget, one, **options)
            optimizer.load_state_dict(saved)
        hurt = "actor" if index == broken else ""
        step(optimizer, lambda i, hurt=hurt: both.backward(i, broken=hurt), index, window)
        step(alone, lambda i, hurt=hurt: apart.backward(i, broken=hurt), index, window)
        for part in range(2 if window else 1):
            apart.backward(2 * index + part if window else index)
            bare.step()
        assert optimizer.last is not None
        assert alone.last is not None
        assert optimizer.last.action is alone.last.action
        assert optimizer.last.candidate == alone.last.candidate or index == broken
        assert bits([*both.actor.parameters()]) == bits([*apart.actor.parameters()])
        assert bits([*both.critic.parameters()]) == bits([*apart.critic.parameters()])
        assert entries(optimizer, both.actor) == entries(alone, apart.actor)
        assert entries(optimizer, both.critic) == entries(bare, apart.critic)
        partial = optimizer.last.triggered
        assert optimizer.last.kept == (4 if partial else 0)
    return optimizer


def _wrapped(problem: PPO, inner: Inner, controller: Controller, budget: Any, one: bool, **options: Any) -> Any:
    optimizer = inner(problem.groups(one), 0.05)
    return STEPOptimizer(
        optimizer, kl=problem.kl, budget=budget, controller=copy.deepcopy(controller), keep="unread", **options
    )


# -- the oracle -------------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(sorted(INNER)),
    controller=controllers(),
    budget=budgets(),
    seed=st.integers(0, 1000),
    one=st.booleans(),
    window=st.booleans(),
    broken=st.none() | st.integers(0, STEPS - 1),
    resumed=st.none() | st.integers(0, STEPS - 1),
)
def test_both_ends_are_those_of_two_optimizers(name, controller, budget, seed, one, window, broken, resumed):
    """The actor's under STEP, the critic's bare: weights and state, bit for bit, over NaNs, windows, checkpoints."""
    optimizer = two_runs(
        INNER[name], controller, budget, seed=seed, one=one, window=window, broken=broken, resumed=resumed
    )
    assert optimizer.last is not None
    assert optimizer.last.accepted.mean <= budget.at(0, ["a", "b"]).mean


@pytest.mark.parametrize(
    "controller",
    [
        Gate(),
        Gate(on_reject="keep_state"),
        Interpolate(on_shrink="restore"),
        Project(steps=1),
        Steer(),
        Interpolate(by_layer={"2.*": 3.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [False, True])
def test_every_way_to_decide(controller, window):
    """All steps are over budget."""
    optimizer = two_runs(INNER["AdamW"], controller, Budget(mean=1e-5), window=window)
    assert optimizer.summary()["partial_commits"] == STEPS


def test_steps_of_adafactor_and_of_a_rate_that_adapts():
    """Factored moments; and the learning rate of what keeps its step is never scaled."""
    two_runs(lambda p, lr: torch.optim.Adafactor(p, lr=lr), Interpolate(), 1e-5)
    two_runs(INNER["SGD"], Gate(), 1e-5, adaptive_rate=True)


@pytest.mark.parametrize("controller", [Interpolate(), Gate(), Interpolate(on_shrink="restore")], ids=str)
def test_copies_of_the_weights_stay_at_the_candidate(controller):
    """Schedule-free keeps z beside every weight, and counts in its groups."""
    schedulefree = pytest.importorskip("schedulefree")

    def inner(parameters: Any, lr: float) -> Any:
        optimizer = schedulefree.AdamWScheduleFree(parameters, lr=lr)
        optimizer.train()
        return optimizer

    optimizer = two_runs(inner, controller, 1e-5)
    assert optimizer.param_groups[1]["k"] == STEPS


def test_eight_bit_states():
    """Bitsandbytes shares its maps between parameters."""
    bnb = pytest.importorskip("bitsandbytes")
    two_runs(lambda p, lr: bnb.optim.AdamW8bit(p, lr=lr, min_8bit_size=4), Gate(), 1e-5)


# -- what is read -----------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A trunk with two heads: actions, and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return self.policy(hidden), self.value(hidden)


def shared_run(keep: Any, **options: Any) -> tuple[Shared, STEPOptimizer, Tensor]:
    torch.manual_seed(1)
    model, observations = Shared(), torch.randn(6, 4)
    kl = PolicyKL(lambda: model(observations)[0], noise_floor=False)
    keep = keep(model) if callable(keep) else keep
    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    return model, STEPOptimizer(inner, kl=kl, budget=1e-5, keep=keep, **options), torch.randn(7, 4)


def train(model: nn.Module, optimizer: STEPOptimizer, data: Tensor) -> None:
    optimizer.zero_grad()
    logits, value = model(data)
    (value.square().mean() - logits.log_softmax(-1)[:, 0].mean()).backward()
    optimizer.step()


def test_a_value_head_is_kept_and_the_trunk_belongs_to_the_policy(tmp_path):
    """The names are in the log, and what was measured."""
    model, optimizer, data = shared_run("unread", controller=Gate(), log=tmp_path / "run.jsonl")
    before = copy.deepcopy(model)
    train(model, optimizer, data)
    assert optimizer.last is not None
    assert optimizer.last.action is Action.REJECT
    assert optimizer.describe()["keep"]["parameters"] == ["value.weight", "value.bias"]
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before.get_parameter(name))
        assert moved == name.startswith("value"), name
    (record,) = read_log(tmp_path / "run.jsonl")
    assert (record.kept, record.probes) == (2, 4)  # a point nearby, its gradient, the suspects moved; and what is left
    assert '"value.weight"' in (tmp_path / "run.jsonl").read_text().splitlines()[0]


def test_named_parameters_are_kept_or_refused():
    """What is read is refused by its name in the first step, and nothing has moved."""
    model, optimizer, data = shared_run(lambda model: model.value.parameters())
    train(model, optimizer, data)
    assert optimizer.last is not None
    assert optimizer.last.kept == 2
    model, optimizer, data = shared_run(lambda model: [model.value.weight, model.trunk.bias], on_error="reject")
    before = picture(model, optimizer)
    del before["gradients"]
    with pytest.raises(ValueError, match=r"keep= names trunk\.bias, which the KL closure reads"):
        train(model, optimizer, data)
    after = picture(model, optimizer)
    assert bits({key: after[key] for key in before}) == bits(before)


def test_an_adapter_that_begins_at_zero_is_read():
    """LoRA's A moves nothing while B is 0; both belong to the policy."""
    torch.manual_seed(0)
    down, up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))
    free, x = nn.Parameter(torch.randn(3)), torch.randn(5, 4)
    kl = PolicyKL(lambda: x @ down.T @ up.T + x[:, :3], noise_floor=False)
    optimizer = STEPOptimizer(torch.optim.SGD([down, up, free], lr=0.1), kl=kl, budget=1e-9, keep="unread")
    for parameter in (down, up, free):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert optimizer.describe()["keep"]["parameters"] == ["param_groups[0]['params'][2]"]


class Goals(nn.Module):
    """An actor with a branch whose inputs may be 0, and a critic; the movement is measured where they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.goal, self.critic = nn.Linear(4, 3), nn.Linear(2, 3, bias=False), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x[:, :4]) + self.goal(x[:, 4:])

    def gradients(self) -> None:
        for i, parameter in enumerate(self.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))


def test_a_branch_whose_inputs_are_0_is_the_policys():
    """Nothing that it does shows on these observations, but the graph reaches it; others would read it."""
    model, x = Goals(), torch.cat([torch.randn(6, 4), torch.zeros(6, 2)], 1)
    kl = PolicyKL(lambda: model(x), model=model)
    optimizer = STEPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), kl, budget=1e-6, keep="unread", controller=Gate()
    )
    before = model.goal.weight.clone()
    model.gradients()
    optimizer.step()
    assert optimizer.describe()["keep"]["parameters"] == ["critic.weight", "critic.bias"]
    assert torch.equal(model.goal.weight, before)


def test_new_observations_are_looked_at_again():
    """What was read once belongs to the policy, also where the next observations do not call it."""

    class Experts(Goals):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x[:, :4]) if not x[:, 4:].any() else super().forward(x)

    model = Experts()
    one = torch.cat([torch.randn(6, 4), torch.zeros(6, 2)], 1)
    both = torch.randn(6, 6)
    kl = PolicyKL(model, observations=one, model=model)
    optimizer = STEPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), kl, budget=1e-6, keep="unread", controller=Gate()
    )
    kept = []
    for x in (one, both, one):
        kl.observe(x)
        model.gradients()
        optimizer.step()
        kept.append(optimizer.describe()["keep"]["parameters"])
    assert kept[0] == ["goal.weight", "critic.weight", "critic.bias"]  # of these observations; the guide says so
    assert kept[1] == kept[2] == ["critic.weight", "critic.bias"]


def test_a_checkpoint_of_another_keep_is_measured_anew():
    """Names are known once they are."""
    model, x = Goals(), torch.randn(6, 6)

    def optimizer(keep: Any) -> STEPOptimizer:
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        return STEPOptimizer(inner, PolicyKL(lambda: model(x), model=model), budget=1e-6, keep=keep, controller=Gate())

    first = optimizer("unread")
    model.gradients()
    first.step()
    saved = copy.deepcopy(first.state_dict())
    same, other = optimizer("unread"), optimizer([model.critic.bias])
    for resumed in (same, other):
        resumed.load_state_dict(copy.deepcopy(saved))
        assert resumed.describe()["keep"]["parameters"] is None
        model.gradients()
        resumed.step()
    assert (same.last.kept, other.last.kept) == (2, 1)


def test_steps_within_budget_are_not_probed():
    """A policy that is none 10 % away does not matter there."""
    model, x = Goals(), torch.randn(6, 6)
    optimizer = STEPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-6), PolicyKL(lambda: model(x), model=model), budget=1.0, keep="unread"
    )
    model.gradients()
    optimizer.step()
    assert (optimizer.last.action, optimizer.last.probes) == (Action.COMMIT, 0)


def test_a_function_without_gradients_is_asked_a_few_times():
    """Of 32 tensors two are read: they are found by halves."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(2)) for _ in range(32)]
    before = [w.detach().clone() for w in weights]

    def kl() -> float:
        return sum(float((weights[i] - before[i]).square().sum()) for i in (3, 21))

    optimizer = STEPOptimizer(torch.optim.SGD(weights, lr=0.1), kl=kl, budget=1e-4, keep="unread", controller=Gate())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.last is not None
    moved = [not torch.equal(w, b) for w, b in zip(weights, before, strict=True)]
    assert moved == [i not in (3, 21) for i in range(32)]
    assert optimizer.last.probes < 32


@given(st.lists(st.frozensets(st.integers(0, 19), min_size=1, max_size=3), max_size=4))
def test_culprits_are_all_that_makes_a_difference(causes):
    """Also what makes one only together; brute force tells."""

    def differs(some: Any) -> bool:
        return any(cause <= set(some) for cause in causes)

    found = culprits(range(20), differs)
    assert not differs([i for i in range(20) if i not in found])
    assert all(i in found for cause in causes if len(cause) == 1 for i in cause)
    if all(len(cause) == 1 for cause in causes):
        assert set(found) == {i for cause in causes for i in cause}


def test_another_closure_and_other_observations_are_measured_again():
    """refresh() and bind() say that something else may be read; it is said if nothing is left."""
    model, optimizer, data = shared_run("unread")
    observations, probes = torch.randn(5, 4), []
    for between in (lambda: None, lambda: None, optimizer.refresh):
        between()
        train(model, optimizer, data)
        assert optimizer.last is not None
        probes.append(optimizer.last.probes > 0)
    assert probes == [True, False, True]
    optimizer.bind(PolicyKL(lambda: torch.cat(model(observations), 1), noise_floor=False), origin="now")
    with pytest.warns(UserWarning, match="reads all parameters of the optimizer"):
        train(model, optimizer, data)
    assert optimizer.describe()["keep"]["parameters"] == []  # the value is a part of that policy
    assert optimizer.last.kept == 0


def test_a_new_group_is_measured():
    """What is added belongs to one of the two."""
    model, optimizer, data = shared_run("unread")
    train(model, optimizer, data)
    model.more = nn.Linear(4, 1)
    optimizer.add_param_group({"params": model.more.parameters()})
    model.more(data).sum().backward()
    optimizer.step()
    assert optimizer.describe()["keep"]["parameters"][2:] == ["more.weight", "more.bias"]


class Experts(nn.Module):
    """Two experts; a gate far from the middle calls the first alone, until the second is called by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.value = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 1)
        self.calls_two = False

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x) if self.calls_two else self.one(x)


def experts() -> tuple[Experts, STEPOptimizer, Tensor]:
    torch.manual_seed(2)
    model, observations = Experts(), torch.randn(6, 4)
    kl = PolicyKL(lambda: model(observations), noise_floor=False, model=model)
    optimizer = STEPOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.05), kl=kl, budget=1e-6, controller=Gate(), keep="unread"
    )
    return model, optimizer, torch.randn(7, 4)


def learn(model: Experts, optimizer: STEPOptimizer, data: Tensor) -> None:
    optimizer.zero_grad()
    (model.one(data) + model.two(data)).log_softmax(-1)[:, 0].mean().backward()
    model.value(data).square().mean().backward()
    optimizer.step()


def test_what_turns_out_to_be_read_is_rolled_back_with_the_rest():
    """An expert that is called from the third step on: the step that would have moved it by stealth is not kept."""
    model, optimizer, data = experts()
    for _ in range(2):
        learn(model, optimizer, data)
        assert optimizer.last is not None
        assert optimizer.last.kept == 4
    model.calls_two = True
    before, moments = copy.deepcopy(model), bits(optimizer.state[model.two.weight])
    with pytest.warns(UserWarning, match=r"reads two\.\w+ now"):
        learn(model, optimizer, data)
    assert optimizer.last.action is Action.REJECT
    assert (optimizer.last.kept, optimizer.last.probes) == (2, 8)  # what is left, theta_t, and six by halves
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)) == (not name.startswith("value")), name
    assert bits(optimizer.state[model.two.weight]) == moments
    learn(model, optimizer, data)  # warned once
    assert optimizer.last.kept == 2
    resumed = copy.deepcopy(optimizer.state_dict())["step_optim"]["unread"]
    assert resumed == {"asked": None, "found": [4, 5], "read": [0, 1, 2, 3]}


def test_a_language_model_with_a_value_head():
    """TokenKL knows the model; its names are in the log, also those of the value head inside."""
    problem = token_problem(3)
    problem.model.value = nn.Linear(6, 1)
    problem.optimizer = torch.optim.AdamW(problem.model.parameters(), lr=0.05)
    optimizer = wrap(problem, 1e-5, Gate(), keep="unread")
    before = copy.deepcopy(problem.model)
    problem.backward(0)
    problem.model.value(torch.ones(6)).sum().backward()
    optimizer.step()
    assert optimizer.last is not None
    assert optimizer.describe()["keep"]["parameters"] == ["value.weight", "value.bias"]
    for name, parameter in problem.model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)) == (not name.startswith("value")), name


def test_a_critic_that_shares_memory_with_the_actor_is_read():
    """A tied weight is one tensor; naming it is refused, finding it keeps it with the policy."""
    torch.manual_seed(0)
    actor, critic, observations = nn.Linear(4, 3), nn.Linear(4, 3), torch.randn(6, 4)
    critic.weight.data = actor.weight.data
    kl = PolicyKL(lambda: actor(observations), noise_floor=False)
    for keep in ("unread", [critic.weight]):
        inner = torch.optim.SGD([*actor.parameters(), *critic.parameters()], lr=0.5)
        optimizer = STEPOptimizer(inner, kl=kl, budget=1e-6, controller=Gate(), keep=keep)
        (actor(observations).square().mean() + critic(observations).square().mean()).backward()
        if keep == "unread":
            optimizer.step()
            assert optimizer.describe()["keep"]["parameters"] == ["param_groups[0]['params'][3]"]
        else:
            with pytest.raises(ValueError, match="which the KL closure reads"):
                optimizer.step()


# -- exactness --------------------------------------------------------------------------------------------------------


def test_an_infinite_budget_is_the_bare_run():
    """Measuring leaves no trace: weights, state, gradients, random streams."""
    runs = []
    for wrapped in (False, True):
        problem = PPO()
        optimizer: Any = INNER["AdamW"](problem.groups(one=True), 0.05)
        if wrapped:
            optimizer = STEPOptimizer(optimizer, kl=problem.kl, budget=math.inf, keep="unread")
        torch.manual_seed(5)
        for index in range(3):
            problem.backward(index)
            optimizer.step()
        inner = getattr(optimizer, "optimizer", optimizer)
        weights = [p for net in (problem.actor, problem.critic) for p in net.parameters()]
        runs.append(bits([*weights, *(inner.state[p] for p in weights), torch.get_rng_state()]))
    assert runs[0] == runs[1]


def test_nothing_is_kept_of_a_critic_that_is_not_finite():
    """Everything is rolled back, the actor too."""
    problem = PPO()
    optimizer = _wrapped(problem, INNER["AdamW"], Interpolate(), 1e-5, one=True)
    for broken in ("", "critic", "actor", ""):
        problem.backward(0, broken=broken)
        before = copy.deepcopy(problem.critic), entries(optimizer, problem.critic)
        optimizer.step()
        assert optimizer.last is not None
        assert (optimizer.last.kept == 0) == (broken == "critic")
        stayed = bits([*problem.critic.parameters()]) == bits([*before[0].parameters()])
        assert stayed == (broken == "critic") == (entries(optimizer, problem.critic) == before[1])


def test_only_the_critic_moves():
    """A step that moves nothing of the policy is a commit, after its audit."""
    problem = PPO()
    optimizer = _wrapped(problem, INNER["AdamW"], Gate(), 1e-9, one=True)
    problem.backward(0)
    problem.actor.zero_grad(set_to_none=True)
    optimizer.step()
    assert optimizer.last is not None
    assert (optimizer.last.action, optimizer.last.candidate.mean, optimizer.last.kept) == (Action.COMMIT, 0.0, 0)


def test_the_record_counts_parts_of_what_is_not_kept():
    """Alpha and alpha_realised are the policy's; progress is that of the whole loss."""
    problem = PPO()
    optimizer = _wrapped(problem, INNER["SGD"], Interpolate(), 1e-6, one=False)
    problem.backward(0)
    squares = [
        sum(float(p.grad.double().square().sum()) for p in net.parameters()) for net in (problem.actor, problem.critic)
    ]
    optimizer.step()
    last = optimizer.last
    assert last is not None
    assert last.alpha_realised == pytest.approx(last.alpha, rel=1e-3)
    assert last.progress == pytest.approx((last.alpha * squares[0] + squares[1]) / sum(squares), rel=1e-3)


@pytest.mark.parametrize("on_error", ["raise", "reject"])
def test_an_error_rolls_everything_back(on_error):
    """It is no decision."""
    problem = PPO()
    fails = False

    class Breaking(Controller):
        def decide(self, trial: Any) -> Any:
            if fails:
                trial.at(0.5)
                raise RuntimeError("on purpose")
            return trial.reject()

    optimizer = STEPOptimizer(
        INNER["AdamW"](problem.groups(one=True), 0.05),
        kl=problem.kl,
        budget=1e-6,
        controller=Breaking(),
        keep="unread",
        on_error=on_error,
    )
    problem.backward(0)
    optimizer.step()
    fails = True
    problem.backward(1)
    both = nn.ModuleList([problem.actor, problem.critic])
    before = picture(both, optimizer)
    if on_error == "raise":
        with pytest.raises(RuntimeError, match="on purpose"):
            optimizer.step()
    else:
        optimizer.step()
    assert bits(picture(both, optimizer)) == bits(before)
    assert optimizer.last is not None
    assert optimizer.last.kept == 0


def test_a_resumed_run_decides_the_same():
    """Records and weights, with the counts: what was measured is part of a checkpoint."""
    runs = []
    for resumed in (False, True):
        problem = PPO()
        optimizer = _wrapped(problem, INNER["AdamW"], Interpolate(), 1e-5, one=True)
        for index in range(4):
            if resumed and index == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = _wrapped(problem, INNER["AdamW"], Interpolate(), 1e-5, one=True)
                optimizer.load_state_dict(saved)
            problem.backward(index)
            optimizer.step()
        assert optimizer.last is not None
        runs.append(
            [optimizer.last.to_dict() | {"seconds": None}, bits(_own(optimizer)), bits([*problem.critic.parameters()])]
        )
    assert runs[0] == runs[1]


def _own(optimizer: STEPOptimizer) -> Any:
    return optimizer.state_dict()["step_optim"]


def test_nothing_changes_without_it():
    """Not an audit more, no entry in a checkpoint, none in the log's first line."""
    problem = PPO()
    calls = 0

    def policy() -> Tensor:
        nonlocal calls
        calls += 1
        return problem.actor(problem.observations)

    kl = PolicyKL(policy, noise_floor=False)
    calls = 0
    optimizer = STEPOptimizer(INNER["AdamW"](problem.groups(one=True), 0.05), kl=kl, budget=1e-6, controller=Gate())
    problem.backward(0)
    optimizer.step()
    assert calls == 2  # the reference, and the candidate
    assert "unread" not in _own(optimizer)
    assert "keep" not in optimizer.describe()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ("read", ValueError, "keep='read' is unknown"),
        ([], ValueError, "names no parameter"),
        (3, TypeError, "keep=3 is no list"),
        ([3], TypeError, r"keep\[0\]=3 is no parameter"),
        ([torch.zeros(2)], ValueError, r"keep\[0\], a tensor of shape \(2,\)"),
        (torch.zeros(2), TypeError, "is no list of parameters"),
    ],
)
def test_what_is_no_list_of_parameters_is_refused(keep, error, message):
    """At construction."""
    problem = PPO()
    with pytest.raises(error, match=message):
        STEPOptimizer(INNER["SGD"](problem.groups(one=True), 0.1), kl=problem.kl, budget=0.1, keep=keep)


def test_joint_state_is_refused():
    """One Hessian for all; a counter for all; a group value for both."""
    problem = PPO()
    with pytest.raises(ValueError, match="LBFGS approximates one Hessian"):
        STEPOptimizer(torch.optim.LBFGS(problem.groups(one=True)), kl=problem.kl, budget=0.1, keep="unread")

    optimizer = _wrapped(problem, Follower, Gate(), 1e-6, one=False)  # it has a counter that all parameters share
    problem.backward(0)
    with pytest.raises(ValueError, match="Follower keeps a"):
        optimizer.step()
    schedulefree = pytest.importorskip("schedulefree")
    inner = schedulefree.AdamWScheduleFree(problem.groups(one=True), lr=0.05)
    inner.train()
    optimizer = STEPOptimizer(inner, kl=problem.kl, budget=1e-6, keep="unread")
    problem.backward(0)
    with pytest.raises(ValueError, match=r"param_groups\[0\] has parameters that keep their whole step and others"):
        optimizer.step()


# -- the flight recorder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", [Interpolate(), Interpolate(by_layer={"2.*": 3.0}), Gate()], ids=str)
def test_kept_steps_are_measured_again_as_they_were(tmp_path, controller):
    """Trials of a kept step read the same again, and what was spared is told."""
    problem = PPO()
    optimizer = _wrapped(problem, INNER["AdamW"], controller, 1e-5, one=True, recorder=tmp_path)
    for index in range(2):
        problem.backward(index)
        optimizer.step()
    (_, kept) = read_flight(tmp_path)
    assert kept.spared == (4, 5, 6, 7)
    alphas = [trial.alpha for trial in kept.record.trials if trial.alpha is not None] or [0.5]
    again = optimizer.remeasure(None, alphas).trials[len(kept.record.trials) :]
    for trial, new in zip(kept.record.trials, again, strict=False):
        assert new.movement.mean == pytest.approx(trial.movement.mean, rel=1e-6)
    seen: list[list[Tensor]] = []
    measured = Visit.measured
    with mock.patch.object(Visit, "measured", lambda visit, values: seen.append(values) or measured(visit, values)):
        optimizer.remeasure(kept, [0.25])
    for i, (now, previous, candidate) in enumerate(zip(seen[0], *kept.ends, strict=True)):
        assert torch.equal(now, candidate) == (i in kept.spared)  # as it was at every point that was tried
        assert not torch.equal(now, previous)
    attribution = optimizer.attribute(by="group")
    assert attribution.candidate.mean == pytest.approx(kept.record.candidate.mean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem.backward(2)
        optimizer.step()
    assert optimizer.last is not None
    assert optimizer.last.kept == 4
