"""Gradients of the constraints, in closed form, against autograd through float64 copies of the models."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from step_optim import ControlSet, PolicyKL, TokenKL
from step_optim.audit.draws import drawn
from step_optim.audit.recompute import layers_of
from tests.audit.test_token_kl import MODELS, build
from tests.models import VOCAB, nudge, ragged_control, tiny_llama

NAMES = ("mean", "slice:early", "slice:late", "drift", "drift:early", "drift:late")
"""Constraints on `ragged_control`."""


def log_probs(twin: nn.Module, prompt: Tensor, response: Tensor) -> Tensor:
    """[T, V] of the response tokens, from one prompt alone."""
    out = twin(torch.cat([prompt, response])[None])
    logits = out if isinstance(out, Tensor) else out.logits
    return logits[0, len(prompt) - 1 : len(prompt) + len(response) - 1].log_softmax(-1)


def oracle(
    model: nn.Module, control: ControlSet, reference: list[Tensor], chosen: list[int], parameters: list[str]
) -> tuple[float, list[Tensor]]:
    """Mean over the chosen prompts of the mean over their tokens of KL(model ‖ reference), and its gradient."""
    twin = copy.deepcopy(model).double().eval()
    total = torch.zeros((), dtype=torch.float64)
    for i in chosen:
        log_c, log_p = log_probs(twin, control.prompts[i], control.responses[i]), reference[i]
        terms = torch.where(log_c == -torch.inf, 0.0, log_c.exp() * (log_c - log_p))
        total = total + terms.sum(-1).mean() / len(chosen)
    named = dict(twin.named_parameters())
    found = torch.autograd.grad(total, [named[name] for name in parameters], allow_unused=True)
    return float(total.detach()), [
        torch.zeros_like(named[name]) if g is None else g for name, g in zip(parameters, found, strict=True)
    ]


def policy(model: nn.Module, control: ControlSet) -> list[Tensor]:
    """Log-probabilities of every prompt's response, float64."""
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return [log_probs(twin, p, r) for p, r in zip(control.prompts, control.responses, strict=True)]


def relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    """‖found - wanted‖ / ‖wanted‖ over all parameters."""
    off = sum(float((f.double() - w).square().sum()) for f, w in zip(found, wanted, strict=True))
    size = sum(float(w.square().sum()) for w in wanted)
    return math.sqrt(off / size)


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_equal_the_oracle(name, recompute) -> None:
    """Every readout, head, and constraint: values and gradients to 1e-4, from pi_ref and from theta_t."""
    model, control = build(name), ragged_control()
    recompute = recompute and any(layers_of(model))
    kl = TokenKL(model, control, noise_floor=False, micro_batch=2, recompute=recompute)
    kl.anchor()
    origin = policy(model, control)
    nudge(model, 0.4, seed=3)
    kl.anchor()
    previous = policy(model, control)
    nudge(model, 0.4, seed=4)
    names = trained_names(model)
    parameters = [dict(model.named_parameters())[n] for n in names]
    for constraint, normal in zip(NAMES, kl.gradients(NAMES, parameters), strict=True):
        kind, _, part = constraint.partition(":")
        chosen = list(control.slices[part] if part else range(len(control)))
        value, wanted = oracle(model, control, origin if kind == "drift" else previous, chosen, names)
        assert normal.value == pytest.approx(value, rel=1e-4)
        assert relative(normal.gradient, wanted) <= 1e-4


def test_one_slice_alone() -> None:
    """Micro-batches without a prompt of it count nothing."""
    model, control = build("llama"), ragged_control()
    kl = TokenKL(model, control, noise_floor=False, micro_batch=1)
    kl.anchor()
    origin = policy(model, control)
    nudge(model, 0.4, seed=3)
    names = trained_names(model)
    parameters = [dict(model.named_parameters())[n] for n in names]
    (normal,) = kl.gradients(["drift:early"], parameters)
    value, wanted = oracle(model, control, origin, list(control.slices["early"]), names)
    assert normal.value == pytest.approx(value, rel=1e-4)
    assert relative(normal.gradient, wanted) <= 1e-4


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_draws_from_a_pool(micro_batch, recompute) -> None:
    """The prompts that were drawn, in any batches and slices; theta_t's policy is read when they are drawn."""
    model, control = build("lora"), ragged_control()
    pool = ControlSet.from_ids(
        [[1, 2], [5, 6, 7, 8], [9], [4, 4], [3, 1, 2]],
        [[20], [21, 22], [23, 24, 25], [26, 27], [28, 29, 30, 31]],
        {"early": [0, 1], "late": [2, 3]},
    )
    kl = TokenKL(model, control, noise_floor=False, micro_batch=micro_batch, pool=pool, recompute=recompute)
    kl.anchor()
    origin = policy(model, pool)
    nudge(model, 0.4, seed=3)
    previous = policy(model, pool)
    kl.anchor()
    draw = kl.draw(4, 1, NAMES)
    assert draw is not None
    nudge(model, 0.4, seed=4)
    names = trained_names(model)
    parameters = [dict(model.named_parameters())[n] for n in names]
    for constraint, normal in zip(NAMES, kl.gradients(NAMES, parameters, draw), strict=True):
        kind, _, part = constraint.partition(":")
        chosen = [i for i in draw.prompts if not part or i in pool.slices[part]]
        value, wanted = oracle(model, pool, origin if kind == "drift" else previous, chosen, names)
        assert normal.value == pytest.approx(value, rel=1e-4)
        assert relative(normal.gradient, wanted) <= 1e-4


def test_masked_logits() -> None:
    """Actions that are never allowed have no gradient, and make none of the others NaN."""
    layer = nn.Linear(3, 4, dtype=torch.float64)
    mask = torch.tensor([[0.0, 0.0, -math.inf, 0.0], [0.0, -math.inf, -math.inf, 0.0], [0.0, 0.0, 0.0, 0.0]])

    def logits() -> Tensor:
        return layer(torch.eye(3, dtype=torch.float64)) + mask

    kl = PolicyKL(logits, slices={"a": [0, 1]}, noise_floor=False)
    kl.anchor()
    with torch.no_grad():
        before = logits().log_softmax(-1)
        layer.weight += torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = list(layer.parameters())
    for constraint, normal in zip(["mean", "slice:a"], kl.gradients(["mean", "slice:a"], parameters), strict=True):
        log_c = logits().log_softmax(-1)
        terms = torch.where(log_c == -math.inf, 0.0, log_c.exp() * (log_c - before)).nan_to_num(0.0)
        total = (terms.sum(-1) if constraint == "mean" else terms[:2].sum(-1)).mean()
        wanted = torch.autograd.grad(total, parameters)
        wanted = [torch.nan_to_num(g) for g in wanted]
        assert all(bool(g.isfinite().all()) for g in normal.gradient)
        assert normal.value == pytest.approx(float(total.detach()), rel=1e-6)


DISTRIBUTIONS = {
    "Normal": lambda z: torch.distributions.Normal(z[:, 0], z[:, 1].exp()),
    "Independent": lambda z: torch.distributions.Independent(torch.distributions.Normal(z, torch.ones_like(z)), 1),
    "Beta": lambda z: torch.distributions.Beta(z[:, 0].exp(), z[:, 1].exp()),
    "Gamma": lambda z: torch.distributions.Gamma(z[:, 0].exp(), z[:, 1].exp()),
    "Bernoulli": lambda z: torch.distributions.Bernoulli(logits=z[:, 0]),
    "Bernoulli of probabilities": lambda z: torch.distributions.Bernoulli(z[:, 0].sigmoid()),
    "Geometric": lambda z: torch.distributions.Geometric(logits=z[:, 0]),
    "Binomial": lambda z: torch.distributions.Binomial(3, logits=z[:, 0]),
    "Dirichlet": lambda z: torch.distributions.Dirichlet(z.exp()),
    "Categorical": lambda z: torch.distributions.Categorical(logits=z),
    "Poisson": lambda z: torch.distributions.Poisson(z[:, 0].exp()),
    "MultivariateNormal": lambda z: torch.distributions.MultivariateNormal(z, torch.diag_embed(z.square() + 1.0)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_gradients_of_distributions(name) -> None:
    """The same as autograd through torch's own KL, in float64."""
    torch.manual_seed(0)
    layer, make = nn.Linear(3, 3, dtype=torch.float64), DISTRIBUTIONS[name]
    inputs = torch.randn(5, 3, dtype=torch.float64)
    kl = PolicyKL(lambda: make(layer(inputs)), slices={"a": [1, 3]}, noise_floor=False)
    kl.anchor()
    with torch.no_grad():
        before = make(layer(inputs).clone())
        layer.weight += 0.1 * torch.randn(3, 3, dtype=torch.float64)
    parameters = list(layer.parameters())
    for constraint, normal in zip(["mean", "slice:a"], kl.gradients(["mean", "slice:a"], parameters), strict=True):
        every = torch.distributions.kl_divergence(make(layer(inputs)), before).reshape(5, -1).sum(1)
        total = every.mean() if constraint == "mean" else every[[1, 3]].mean()
        wanted = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(parameters, torch.autograd.grad(total, parameters, allow_unused=True), strict=True)
        ]
        assert normal.value == pytest.approx(float(total.detach()), rel=1e-6)
        assert relative(normal.gradient, wanted) <= 1e-4


@given(size=st.integers(1, 30), count=st.integers(1, 40), around=st.integers(0, 5), split=st.integers(0, 30))
def test_draws_of_one_round_have_no_prompt_in_common(size, count, around, split) -> None:
    """And a turn draws the same every time, half of it from each of two slices as long as both have some."""
    halves = range(min(split, size)), range(min(split, size), size)
    count = min(count, size)
    turns = range(around * (size // count), (around + 1) * (size // count))
    draws = [drawn(range(size), halves, count, turn) for turn in turns]
    assert draws == [drawn(range(size), halves, count, turn) for turn in turns]
    assert len({prompt for draw in draws for prompt in draw}) == count * len(draws)
    first = [sum(prompt in halves[0] for prompt in draw) for draw in draws]
    enough = min(map(len, halves)) * 2
    assert all(
        abs(2 * n - count) <= 1 for n, end in zip(first, range(count, size + 1, count), strict=False) if end <= enough
    )


def test_a_pool_that_shares_a_prompt_is_refused() -> None:
    """Directions from a prompt that judges would make it a judge of itself."""
    model, control = tiny_llama(), ragged_control()
    pool = ControlSet.from_ids([[1, 1], [7, 8]], [[2], [3]])
    with pytest.raises(ValueError, match="prompt 1 of the pool is prompt 2 of the control set"):
        TokenKL(model, control, pool=pool)
    with pytest.raises(TypeError, match="is no ControlSet"):
        TokenKL(model, control, pool=[[1, 2]])
    with pytest.raises(ValueError, match="vocabulary"):
        TokenKL(model, control, pool=ControlSet.from_ids([[VOCAB]], [[1]]))


@pytest.mark.parametrize("name", ["lora", "llama", "gemma2", "bigram"])
def test_a_penalty_is_the_drift_on_a_draw(name) -> None:
    """Its value, and what it adds to the gradients, from the pool's prompts, others at every call."""
    model, control = build(name), ragged_control()
    pool = ControlSet.from_ids([[1, 2], [5, 6], [9], [4, 4]], [[20], [21, 22], [23, 24], [26, 27]])
    kl = TokenKL(model, control, noise_floor=False, pool=pool)
    assert kl.penalty(2).item() <= 1e-12  # pi_ref is the policy as it is, read in another layout
    origin = policy(model, pool)
    nudge(model, 0.4, seed=3)
    names = trained_names(model)
    for turn in (1, 2):
        chosen = drawn(range(4), [], 2, turn)
        value, wanted = oracle(model, pool, origin, chosen, names)
        model.zero_grad()
        found = kl.penalty(2)
        (3.0 * found).backward()
        assert found.item() == pytest.approx(value, rel=1e-4)
        grads = dict(model.named_parameters())
        assert relative([grads[n].grad / 3.0 for n in names], wanted) <= 1e-4
    with pytest.raises(ValueError, match="prompts=0"):
        kl.penalty(0)


def test_a_penalty_goes_on_where_a_checkpoint_was_saved() -> None:
    """With the draws that would have come next; also without a pool."""
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def make() -> tuple[nn.Linear, PolicyKL]:
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        return layer, PolicyKL(lambda: layer(inputs), noise_floor=False)

    layer, kl = make()
    kl.penalty(2)
    nudge(layer, 0.4)
    kl.penalty(2)
    state = kl.state_dict()
    wanted = [kl.penalty(2).item() for _ in range(3)]
    other, resumed = make()
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(state)
    assert [resumed.penalty(2).item() for _ in range(3)] == wanted
    assert len(set(wanted)) == 3


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_penalties_of_distributions(name) -> None:
    """The mean over what was drawn, by torch's own KL."""
    torch.manual_seed(0)
    layer, make = nn.Linear(3, 3, dtype=torch.float64), DISTRIBUTIONS[name]
    inputs = torch.randn(5, 3, dtype=torch.float64)
    kl = PolicyKL(lambda: make(layer(inputs)), noise_floor=False)
    kl.anchor()
    before = make(layer(inputs).detach().clone())
    nudge(layer, 0.3)
    found = kl.penalty(2)
    every = torch.distributions.kl_divergence(make(layer(inputs)), before).reshape(5, -1).sum(1)
    wanted = every[drawn(range(5), [], 2, 0)].mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    parts = [torch.autograd.grad(total, list(layer.parameters())) for total in (found, wanted)]
    assert relative(list(parts[0]), list(parts[1])) <= 1e-4
