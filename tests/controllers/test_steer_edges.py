"""Steer, pools and penalties where something changes on the way, or is not as it should be."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli

from step_optim import Budget, Controller, ControlSet, Interpolate, PolicyKL, Steer, STEPOptimizer, TokenKL
from step_optim.audit.closure import FunctionKL
from step_optim.controllers import Action
from step_optim.controllers.bundle import Bundle, Cut, inner
from tests.models import nudge, ragged_control, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:PolicyKL has no pool")

INPUTS = torch.linspace(-1, 1, 24).reshape(6, 4)


class World:
    """A linear policy that is pushed around, with a pool."""

    def __init__(self, budget, controller=None, slices=None, **options) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3, bias=False)
        others = torch.randn(5, 4)
        self.kl = PolicyKL(lambda: self.layer(INPUTS), slices, noise_floor=False, pool=lambda: self.layer(others))
        inner_step = torch.optim.SGD(self.layer.parameters(), lr=0.3)
        self.optimizer = STEPOptimizer(
            inner_step, kl=self.kl, budget=budget, controller=controller or Steer(), **options
        )

    def step(self, number: int):
        torch.manual_seed(100 + number)
        self.layer.weight.grad = -torch.rand(3, 4) * torch.tensor([[1.0], [-1.0], [0.0]])
        self.optimizer.step()
        return self.optimizer.last

    def at_the_cap(self, steps: int = 6) -> World:
        for number in range(steps):
            self.step(number)
        assert self.optimizer._run.memory["cuts"]
        return self


@pytest.mark.filterwarnings("ignore:bind")
def test_slices_of_another_closure_do_not_break_the_adaptive_rate() -> None:
    """What the last closure measured is not held against the budgets of this one; the step ends in any case."""
    world = World(Budget(mean=0.01, drift_slices=0.05), Interpolate(), {"s": [0, 1, 2]}, adaptive_rate=True)
    world.step(0)
    world.optimizer.bind(PolicyKL(lambda: world.layer(INPUTS), {"u": [0, 1, 2]}, noise_floor=False))
    for number in range(5):
        assert world.step(number).accepted.mean <= 0.01
    assert world.optimizer.last.step == 5


def test_resume_with_an_adaptive_rate_at_a_cap() -> None:
    """The scale follows from what the step itself measured."""
    options = {"budget": Budget(mean=1.0, drift=0.02), "adaptive_rate": True}
    world = World(**options).at_the_cap(4)
    saved, weights = copy.deepcopy(world.optimizer.state_dict()), copy.deepcopy(world.layer.state_dict())
    other = World(**options)
    other.layer.load_state_dict(weights)
    other.optimizer.load_state_dict(saved)
    for number in range(4, 8):
        assert world.step(number).scale == other.step(number).scale
    assert torch.equal(world.layer.weight, other.layer.weight)


def test_a_normal_that_is_not_finite_is_left_out() -> None:
    """Or 0: it tells nothing, and would poison all later steps and the checkpoint."""
    bundle, here = Bundle([], inner), [torch.ones(2)]
    for normal in ([1.0, float("nan")], [float("inf"), 0.0], [0.0, 0.0]):
        bundle.add("drift", [torch.tensor(normal)], 1.0, here)
    assert bundle.cuts == []


@pytest.mark.filterwarnings("ignore:bind")
def test_models_end_with_what_they_are_of() -> None:
    """Another pi_ref, another closure, one more parameter; wrong shapes in a checkpoint are dropped."""
    cap = Budget(drift=0.005)
    world = World(cap).at_the_cap()
    world.optimizer.refresh(restart_drift=True)
    assert "cuts" not in world.optimizer._run.memory

    world = World(cap).at_the_cap()
    world.optimizer.bind(PolicyKL(lambda: world.layer(INPUTS), noise_floor=False, pool=lambda: world.layer(INPUTS[:2])))
    assert "cuts" not in world.optimizer._run.memory

    world = World(cap).at_the_cap()
    more = nn.Parameter(torch.zeros(3))
    world.optimizer.bind(
        PolicyKL(lambda: world.layer(INPUTS) + more, noise_floor=False, pool=lambda: world.layer(INPUTS[:2]) + more)
    )
    world.at_the_cap()
    world.optimizer.add_param_group({"params": [more]})
    more.grad = torch.ones(3)
    assert world.step(9).reference_drift.mean <= 0.005

    world = World(cap).at_the_cap()
    state = world.optimizer.state_dict()
    for cut in state["step_optim"]["controller"]["cuts"]:
        cut["normal"] = [torch.ones(2, 2)]
    world.optimizer.load_state_dict(state)
    assert world.step(9).steering["remembered"] == 0


def test_models_move_to_the_weights() -> None:
    """A checkpoint that was read to another device."""
    world = World(Budget(drift=0.005)).at_the_cap()
    cut = world.optimizer._run.memory["cuts"][0]
    assert torch.device(cut["normal"][0].device) == world.layer.weight.device
    away = Cut("drift", [torch.ones(3, 4, device="meta")], 0.0)
    assert away.fits([world.layer.weight])
    assert Cut("drift", [torch.ones(3, 4)], 0.0).on([torch.ones(3, 4, device="meta")]).normal[0].is_meta


def test_another_controller_does_not_keep_the_models() -> None:
    """They are as large as the weights."""
    world = World(Budget(drift=0.005)).at_the_cap()
    other = World(Budget(drift=0.005), Interpolate())
    other.optimizer.load_state_dict(world.optimizer.state_dict())
    assert "cuts" not in other.optimizer.state_dict()["step_optim"]["controller"]


def test_what_a_controller_of_ones_own_remembers_is_rolled_back() -> None:
    """Tensors that it writes into, and tuples with names."""

    class Averaging(Controller):
        fails = False

        def decide(self, trial):
            trial.memory.setdefault("mean", torch.zeros(1)).add_(1)
            if self.fails:
                raise RuntimeError("injected")
            return trial.reject()

    world = World(Budget(mean=1e-9), Averaging())
    world.step(0)
    saved = world.optimizer.state_dict()
    world.optimizer.controller.fails = True
    with pytest.raises(RuntimeError, match="injected"):
        world.step(1)
    assert float(world.optimizer._run.memory["mean"]) == 1.0
    assert float(saved["step_optim"]["controller"]["mean"]) == 1.0


def test_a_penalty_with_masked_logits_is_finite() -> None:
    """Actions that are never allowed add nothing, at rest and afterwards."""
    layer, mask = nn.Linear(4, 3), torch.zeros(6, 3, dtype=torch.bool)
    mask[:3, 2] = True
    kl = PolicyKL(lambda: layer(INPUTS).masked_fill(mask, -torch.inf), noise_floor=False)
    assert kl.penalty(6).item() == 0.0
    nudge(layer, 0.3)
    found = kl.penalty(6)
    found.backward()
    assert 0 < found.item() < 10
    assert bool(layer.weight.grad.isfinite().all())


@pytest.mark.parametrize("read", ["probs", "logits", None])
@pytest.mark.parametrize("give", ["probs", "logits"])
def test_what_was_computed_from_the_parameters_hides_no_gradient(give, read) -> None:
    """Torch keeps the probabilities of a Bernoulli that was made from logits, once somebody has read them."""
    layer = nn.Linear(4, 1, bias=False, dtype=torch.float64)

    def policy() -> Bernoulli:
        z = layer(INPUTS.double())[:, 0]
        made = Bernoulli(probs=z.sigmoid()) if give == "probs" else Bernoulli(logits=z)
        if read:
            getattr(made, read)
        return made

    kl = PolicyKL(policy, noise_floor=False)
    kl.anchor()
    before = Bernoulli(logits=layer(INPUTS.double())[:, 0].detach())
    nudge(layer, 0.5)
    (normal,) = kl.gradients(["drift"], [layer.weight])
    here = Bernoulli(logits=layer(INPUTS.double())[:, 0])
    (wanted,) = torch.autograd.grad(torch.distributions.kl_divergence(here, before).mean(), [layer.weight])
    torch.testing.assert_close(normal.gradient[0], wanted, rtol=1e-4, atol=1e-8)


class Crowded(nn.Module):
    """Says other things beside others: its prompts have to be read one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.tanh(self.embed(input_ids))) * (1 + 0.5 * len(input_ids))


def test_a_pool_is_read_one_by_one_where_the_control_set_is() -> None:
    """At rest a penalty is 0, however many prompts are drawn."""
    responses = [[4, 5], [6, 6], [7, 8], [1, 1], [2, 2]]
    control = ControlSet.from_ids([[1, 2], [3, 3], [4, 5], [7, 7], [8, 8]], responses)
    pool = ControlSet.from_ids([[1, 3], [2, 3], [4, 7], [9, 9], [1, 9]], responses)
    torch.manual_seed(0)
    kl = TokenKL(Crowded(), control, pool=pool, noise_floor=False)
    kl.anchor()
    assert any("read alone" in why for why in kl.fallbacks)
    assert [kl.penalty(count).item() for count in range(1, 6)] == pytest.approx([0.0] * 5, abs=1e-10)


def other_prompts() -> ControlSet:
    return ControlSet.from_ids([[1, 2], [3, 3], [14]], [[4, 5], [6, 7], [8]])


def test_a_head_that_is_unfrozen_later_does_not_move_the_pools_origin() -> None:
    """pi_ref has a copy of it from then on."""
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    kl = TokenKL(model, ragged_control(), pool=other_prompts(), noise_floor=False)
    kl.anchor()
    model.lm_head.requires_grad_(True)
    kl.anchor()
    with torch.no_grad():
        model.lm_head.weight += 0.3 * torch.randn_like(model.lm_head.weight)
    assert kl.penalty(3).item() > 0.01
    assert kl.audit_with_drift().drift.mean > 0.01


def test_a_pool_of_another_run_begins_anew() -> None:
    """Its pi_ref is the policy with which this run begins."""
    layer = nn.Linear(4, 3)
    pool = PolicyKL(lambda: layer(INPUTS[:3]), noise_floor=False)
    pool.anchor()
    nudge(layer, 0.5)
    kl = PolicyKL(lambda: layer(INPUTS), noise_floor=False, pool=pool)
    kl.anchor()
    assert kl.penalty(3).item() == 0.0


def test_a_policy_without_a_graph_is_shrunk_and_that_is_said() -> None:
    """Fn under no_grad has no gradients."""
    layer = nn.Linear(4, 3)

    def policy() -> torch.Tensor:
        with torch.no_grad():
            return layer(INPUTS)

    kl, step = PolicyKL(policy, noise_floor=False), torch.optim.SGD(layer.parameters(), lr=1.0)
    with pytest.warns(UserWarning, match="has no gradients"):
        optimizer = STEPOptimizer(step, kl=kl, budget=0.001, controller=Steer())
    layer.weight.grad = torch.randn(3, 4)
    optimizer.step()
    assert optimizer.last.action is Action.SHRINK


def test_a_budget_that_is_set_later_is_checked_against_the_pool() -> None:
    """Not in the middle of a step."""
    world = World(Budget(drift=0.01), slices={"s": [0, 1]})
    with pytest.raises(ValueError, match="of which the pool has no prompts"):
        world.optimizer.set_budget(Budget(drift_slices=0.01))
    assert world.optimizer.budget == Budget(drift=0.01)


def test_a_function_of_which_a_part_has_no_graph_is_shrunk() -> None:
    """All figures need one."""
    weight = nn.Parameter(torch.zeros(2))
    assert not FunctionKL(lambda: {"x": weight.sum(), "y": 0.0}).has_gradients
    assert FunctionKL(lambda: {"x": weight.sum(), "y": weight[0]}).has_gradients


def test_pool_texts_that_are_too_long_are_refused_at_construction() -> None:
    """As those of the control set are."""
    model = tiny_gpt2()
    limit = model.config.n_positions
    long = ControlSet.from_ids([[1] * limit], [[2, 3]])
    with pytest.raises(ValueError, match="tokens with its response"):
        TokenKL(model, ragged_control(), pool=long, noise_floor=False)


def test_a_checkpoint_that_does_not_fit_the_pool_leaves_the_closure_as_it_was() -> None:
    """It is looked at before anything is taken over."""
    layer = nn.Linear(4, 3)
    plain, pooled = (
        PolicyKL(lambda: layer(INPUTS), noise_floor=False, pool=pool) for pool in (None, lambda: layer(INPUTS[:2]))
    )
    plain.anchor()
    with pytest.raises(ValueError, match="without pool="):
        pooled.load_state_dict(plain.state_dict())
    assert pooled._origin is None


def test_progress_of_complex_weights() -> None:
    """The real part of the inner product, as everywhere."""
    weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    kl = PolicyKL(lambda: torch.stack([weight.real, weight.imag, 0 * weight.real], 1), noise_floor=False)
    optimizer = STEPOptimizer(
        torch.optim.SGD([weight], lr=1.0), kl=kl, budget=Budget(mean=1e-3), controller=Interpolate()
    )
    weight.grad = torch.full((3,), 1j, dtype=torch.complex64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.last.progress == pytest.approx(optimizer.last.alpha_realised, rel=1e-5)
