"""PolicyKL: the movement of any policy that is a function of the weights."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    MixtureSameFamily,
    Normal,
    TransformedDistribution,
)
from torch.distributions.transforms import TanhTransform

from step_optim import Budget, Gate, Interpolate, Movement, PolicyKL, STEPOptimizer
from step_optim.host.rng import RNGState
from step_optim.snapshot.tensors import same_bits
from tests import reference
from tests.models import nudge

OBSERVATIONS = 6


class Actor(nn.Module):
    """Observations -> logits, and a state-independent log standard deviation."""

    def __init__(self, actions: int = 4, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.drop, self.head = nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, actions)
            self.log_std = nn.Parameter(torch.zeros(actions))
            self.observations = torch.randn(OBSERVATIONS, 3)

    def forward(self) -> torch.Tensor:
        """Logits or means, [N, A]."""
        return self.head(self.drop(torch.tanh(self.body(self.observations))))


POLICIES = {
    "logits": lambda actor: actor(),
    "categorical": lambda actor: Categorical(logits=actor()),
    "categorical, probs": lambda actor: Categorical(probs=actor().softmax(-1)),
    "normal": lambda actor: Normal(actor(), actor.log_std.exp().expand(OBSERVATIONS, 4)),
    "raw parameter": lambda actor: Normal(actor(), actor.log_std + 2),
    "independent": lambda actor: Independent(Normal(actor(), actor.log_std.exp()), 1),
    "bernoulli": lambda actor: Bernoulli(logits=actor()),
}
EVERY = pytest.mark.parametrize("name", POLICIES)
LOGITS = ["logits", "categorical", "categorical, probs"]


def normal_kl(candidate: tuple[float, float], previous: tuple[float, float]) -> float:
    """KL of two univariate Gaussians, from the textbook."""
    (m_c, s_c), (m_p, s_p) = candidate, previous
    return math.log(s_p / s_c) + (s_c**2 + (m_c - m_p) ** 2) / (2 * s_p**2) - 0.5


def bernoulli_kl(z_c: float, z_p: float) -> float:
    """KL of two coins, from their logits."""
    return reference.row_kl([z_c, 0.0], [z_p, 0.0])


def wide(actor: Actor) -> Actor:
    """A float64 eval-mode twin."""
    twin = copy.deepcopy(actor).double().eval()
    twin.observations = actor.observations.double()
    return twin


def per_observation(name: str, old: Actor, new: Actor) -> list[float]:
    """The oracle: KL(candidate ‖ previous) of each observation, factors added up."""
    old, new = wide(old), wide(new)
    with torch.no_grad():
        z_p, z_c = old(), new()
    pairs = list(zip(z_c.tolist(), z_p.tolist(), strict=True))
    if name in LOGITS:
        return [reference.row_kl(c, p) for c, p in pairs]
    if name == "bernoulli":
        return [sum(bernoulli_kl(c, p) for c, p in zip(*pair, strict=True)) for pair in pairs]
    std = (lambda actor: actor.log_std + 2) if name == "raw parameter" else lambda actor: actor.log_std.exp()
    s_p, s_c = std(old).tolist(), std(new).tolist()
    return [sum(normal_kl((c[a], s_c[a]), (p[a], s_p[a])) for a in range(4)) for c, p in pairs]


def mean(values: list[float]) -> float:
    """Plain mean."""
    return sum(values) / len(values)


def close(measured: float, wanted: float) -> None:
    """A figure is right to what float32 allows of outputs of size 1."""
    assert measured == reference.near(wanted, rel=1e-5)


@EVERY
@settings(max_examples=10)
@given(
    members=st.dictionaries(st.sampled_from("ab"), st.lists(st.integers(0, OBSERVATIONS - 1), min_size=1, unique=True)),
    size=st.sampled_from([0.01, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
def test_movement_equals_the_oracle(name, members, size, seed) -> None:
    """Every kind of policy equals the closed forms, observation by observation, in overlapping slices."""
    old, new = Actor(seed=seed), Actor(seed=seed).train()
    kl = PolicyKL(lambda: POLICIES[name](new), members, model=new)
    kl.anchor()
    nudge(new, size, seed)
    moved = kl()
    wanted = per_observation(name, old, new)
    close(moved.mean, mean(wanted))
    assert moved.slices.keys() == members.keys()
    for key, chosen in members.items():
        close(moved.slices[key], mean([wanted[i] for i in chosen]))


@EVERY
def test_zero_movement_is_exactly_zero_in_train_mode(name) -> None:
    """Dropout is off in an audit, found as the module is called; flags and random streams are put back."""
    actor = Actor().train()
    kl = PolicyKL(lambda: POLICIES[name](actor))
    stream = RNGState.capture()
    kl.anchor()
    assert kl().mean == 0.0
    assert kl.drift().mean == 0.0
    assert all(module.training for module in actor.modules())
    assert same_bits(RNGState.capture().torch_cpu, stream.torch_cpu)


@pytest.mark.parametrize(
    "name",
    [*LOGITS, *(name for name in POLICIES if name not in LOGITS)],
)
def test_small_movements_are_right(name) -> None:
    """Policies are measured with numerics worth the name: near 1e-8 in float32 the figure still is one."""
    for seed in range(5):
        old, new = Actor(seed=seed), Actor(seed=seed)
        kl = PolicyKL(lambda new=new: POLICIES[name](new))
        kl.anchor()
        nudge(new, 2e-4, seed)
        moved = kl().mean
        wanted = mean(per_observation(name, old, new))
        assert 1e-10 < wanted < 1e-7
        close(moved, wanted)


@EVERY
def test_the_reference_is_a_copy(name) -> None:
    """A distribution that holds a parameter itself must not follow training, neither as reference nor as audit."""
    actor = Actor()
    kl = PolicyKL(lambda: POLICIES[name](actor))
    kl.anchor()
    nudge(actor, 0.3, 1)
    here, audit = Actor(), kl.audit()
    nudge(here, 0.3, 1)
    nudge(actor, 0.3, 2)
    kl.anchor(audit)
    assert kl().mean == pytest.approx(mean(per_observation(name, here, actor)), rel=2e-3)


def test_a_parameter_as_the_distributions_own_tensor() -> None:
    """Normal(mean, std) over the very parameters, without a copy in between, still measures their movement."""
    loc, scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    kl = PolicyKL(lambda: Normal(loc, scale))
    kl.anchor()
    with torch.no_grad():
        scale.mul_(2)
        loc.add_(1)
    assert kl().mean == pytest.approx(normal_kl((1, 2), (0, 1)))


@EVERY
def test_logits_are_known(name) -> None:
    """Logits and categorical policies can be projected, other distributions cannot."""
    actor = Actor()
    assert PolicyKL(lambda: POLICIES[name](actor)).has_logits == (name in LOGITS)


@EVERY
def test_promotion_and_drift(name) -> None:
    """A promoted audit is the next reference; drift is measured from the first."""
    first, actor = Actor(), Actor()
    kl = PolicyKL(lambda: POLICIES[name](actor))
    kl.anchor()
    for turn in range(3):
        here = Actor()
        here.load_state_dict(actor.state_dict())
        nudge(actor, 0.1, turn)
        audit = kl.audit()
        assert audit.movement.mean == pytest.approx(mean(per_observation(name, here, actor)), rel=2e-3)
        kl.anchor(audit)
        assert kl().mean == 0.0
        assert kl.drift().mean == pytest.approx(mean(per_observation(name, first, actor)), rel=2e-3)


@EVERY
def test_state_dict_keeps_pi_ref(name) -> None:
    """A resumed run measures drift from the same pi_ref, through a file."""
    actor = Actor()
    kl = PolicyKL(lambda: POLICIES[name](actor), {"a": [0, 1]})
    assert kl.state_dict() == {}
    kl.anchor()
    nudge(actor, 0.3)
    kl.anchor(kl.audit())
    file = io.BytesIO()
    torch.save(kl.state_dict(), file)
    file.seek(0)
    resumed = PolicyKL(lambda: POLICIES[name](actor), {"a": [0, 1]})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.anchor()
    assert kl.drift().mean > 0
    assert resumed.drift() == kl.drift()


@EVERY
def test_a_trust_region_around_it(name) -> None:
    """One interpolated step: feasible by the oracle, and as far as the budget allows."""
    old, actor = Actor(), Actor().train()
    optimizer = STEPOptimizer(
        torch.optim.SGD(actor.parameters(), lr=1.0),
        kl=PolicyKL(lambda: POLICIES[name](actor), model=actor),
        budget=1e-3,
        controller=Interpolate(tol=0.01),
    )
    for i, p in enumerate(actor.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    optimizer.step()
    assert optimizer.last.action == "shrink"
    moved = mean(per_observation(name, old, actor))
    assert 0.97e-3 < moved < 1.001e-3
    assert optimizer.last.accepted.mean == pytest.approx(moved, rel=2e-3)


def test_slices_are_capped_each() -> None:
    """A gate on one observation slice rejects what moves only there."""
    actor = Actor()
    optimizer = STEPOptimizer(
        torch.optim.SGD([actor.head.bias], lr=1.0),
        kl=PolicyKL(actor, {"all": range(OBSERVATIONS), "one": [2]}),
        budget=Budget(slices={"one": 1e-3}),
        controller=Gate(),
    )
    actor.head.bias.grad = torch.tensor([1.0, 0.0, 0.0, 0.0])
    optimizer.step()
    assert optimizer.last.action == "reject"
    assert optimizer.last.bound == "slice:one"


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (lambda: 3.0, TypeError, "fn returned float; give logits"),
        (lambda: None, TypeError, "fn returned NoneType; give logits"),
        (lambda: torch.zeros(4), ValueError, r"logits.*\(4,\)"),
        (lambda: torch.zeros(2, 3, 4), ValueError, r"logits.*\(2, 3, 4\)"),
        (lambda: torch.zeros(0, 4), ValueError, r"\(0, 4\)"),
        (lambda: Normal(0.0, 1.0), ValueError, r"batch shape \(\); its first dimension"),
        (lambda: Normal(torch.zeros(0), torch.ones(0)), ValueError, r"batch shape \(0,\)"),
    ],
)
def test_what_a_function_must_return(out, error, message) -> None:
    """Anything but logits [N, A] or a batched distribution is refused at construction, with what it was."""
    with pytest.raises(error, match=message):
        PolicyKL(out)


def test_fn_must_be_callable() -> None:
    """A tensor in the place of the function is refused."""
    with pytest.raises(TypeError, match=r"(?s)fn=.* is not callable; pass a function"):
        PolicyKL(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"a": []}, "slice 'a' is empty"),
        ({"a": [6]}, "slice 'a' holds 6, but .* 0 to 5"),
        ({"a": [-1]}, "slice 'a' holds -1"),
        ({"a": [1, 1]}, "slice 'a' names .* twice"),
        ({"mean": [1]}, "cannot be named 'mean'"),
    ],
)
def test_bad_slices(slices, message) -> None:
    """Slices are checked against the number of observations."""
    with pytest.raises(ValueError, match=message):
        PolicyKL(Actor(), slices)


def test_observations_must_stay() -> None:
    """A function that suddenly returns another number of observations is an error with both numbers."""
    actor = Actor()
    kl = PolicyKL(actor)
    kl.anchor()
    actor.observations = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="fn returned 2 observations, 6 at first"):
        kl()


def test_squashed_gaussians() -> None:
    """A tanh-squashed Gaussian moves as far as the Gaussian inside it: KL does not see a bijection."""
    squashed, plain = Actor(), Actor()
    transform = TanhTransform()
    kls = [
        PolicyKL(lambda: TransformedDistribution(Normal(squashed(), squashed.log_std.exp()), [transform])),
        PolicyKL(lambda: Normal(plain(), plain.log_std.exp())),
    ]
    for kl, actor in zip(kls, (squashed, plain), strict=True):
        kl.anchor()
        assert kl().mean == 0.0
        nudge(actor, 0.1)
    assert kls[0]().mean > 0
    assert kls[0]() == kls[1]()


def test_a_policy_without_a_closed_form_kl() -> None:
    """A mixture has no KL in torch: it is refused at construction, by name and with the ways out."""
    actor = Actor()

    def mixture() -> MixtureSameFamily:
        return MixtureSameFamily(Categorical(logits=actor()), Normal(actor(), 1.0))

    with pytest.raises(TypeError, match=r"fn returned MixtureSameFamily.* no closed form.*logits.*as kl="):
        PolicyKL(mixture)


def test_broken_policies_read_nan() -> None:
    """NaN logits make NaN figures; no budget accepts them."""
    actor = Actor()
    kl = PolicyKL(actor, {"a": [0]})
    kl.anchor()
    with torch.no_grad():
        actor.head.bias.fill_(math.nan)
    moved = kl()
    assert math.isnan(moved.mean)
    assert not Budget(mean=1e9).at(0).judge(moved).feasible


def test_masked_actions() -> None:
    """Invalid actions masked with -inf, as in games, are measured without NaN."""
    actor = Actor()
    mask = torch.tensor([True, False, False, True])
    kl = PolicyKL(lambda: Categorical(logits=actor().masked_fill(mask, -math.inf)))
    kl.anchor()
    assert kl() == Movement(0.0)
    old = Actor()
    nudge(actor, 0.3)
    with torch.no_grad():
        pairs = [(a[1:3].tolist(), b[1:3].tolist()) for a, b in zip(actor.eval()(), old.eval()(), strict=True)]
    assert kl().mean == pytest.approx(mean([reference.row_kl(c, p) for c, p in pairs]), rel=1e-4)


def test_an_edit_of_the_module_is_noticed() -> None:
    """The modules that the function called are watched: an outside edit changes the fingerprint, an audit does not."""
    actor = Actor()
    kl = PolicyKL(lambda: actor())
    kl.anchor()
    known = kl.fingerprint()
    kl()
    assert kl.fingerprint() == known
    with torch.no_grad():
        actor.head.weight.add_(0)
    assert kl.fingerprint() != known
