"""What PolicyKL checks at rest, its figure for several factors or tokens, and what it can tell from rounding."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Dirichlet,
    Distribution,
    Independent,
    Normal,
    OneHotCategorical,
)
from torch.func import functional_call

from step_optim import Budget, Gate, PolicyKL, Project, STEPOptimizer
from step_optim.audit.noise import SIZES, moved_by, trained_weights
from step_optim.controllers.base import Action
from step_optim.isolation.stand_ins import standing_in
from tests import reference
from tests.models import nudge
from tests.strategies import bits

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
BF16 = torch.bfloat16


def net(out: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A small policy network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, out)).to(dtype)


def warned(make: Callable[[], PolicyKL]) -> tuple[PolicyKL, list[str]]:
    """The closure, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return make(), [str(warning.message) for warning in caught]


class Counter:
    """Moves a little with every call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensor:
        """Logits that depend on how often they were asked for."""
        self.calls += 1
        return X[:, :3] * (1 + 1e-3 * self.calls)


MODEL = net()
GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "fn",
    [
        lambda: MODEL(torch.randn(6, 8)),
        lambda: MODEL(torch.randn(6, 8, generator=GENERATOR)),
        lambda: nn.functional.dropout(MODEL(X), 0.5),
        lambda: Normal(MODEL(X) + 1e-4 * torch.randn(6, 6), 1.0),
        Counter(),
    ],
)
def test_a_function_that_is_no_function_of_the_weights_is_refused(fn) -> None:
    """Unmoved weights that do not read 0 are an error at construction, with the reading and the remedy."""
    with pytest.raises(
        ValueError, match=r"unmoved weights read K = \d.* instead of 0.*observations.*noise_floor=False"
    ):
        PolicyKL(fn)
    kl = PolicyKL(fn, noise_floor=False)
    assert kl.noise_floor is None
    kl.anchor()
    torch.rand(1)  # as training does
    assert kl().mean > 0


def test_a_policy_of_nan_is_refused() -> None:
    """It says that, and nothing of dropout."""
    with pytest.raises(ValueError, match="has NaN in it"):
        PolicyKL(lambda: MODEL(X) * math.nan)


@pytest.mark.parametrize(
    "make",
    [
        lambda z: z[:, :1],
        lambda z: Categorical(logits=z[:, :1]),
        lambda z: Independent(Categorical(logits=z[:, :, None]), 1),
        lambda z: OneHotCategorical(logits=z[:, :, None]),
        lambda z: Dirichlet(z[:, :1].exp()),
    ],
)
def test_a_single_action_is_refused(make) -> None:
    """Its KL is 0 whatever is trained: a reward model's logits [N, 1]."""
    with pytest.raises(ValueError, match=r"shape \(6, .*1\).*one action only.*Bernoulli.*Normal\(value"):
        PolicyKL(lambda: make(MODEL(X)))


def test_logits_with_more_dimensions_are_refused_with_the_choices() -> None:
    """Factors of one action, or tokens of one text."""
    with pytest.raises(ValueError, match=r"\(6, 2, 3\).*Independent\(Categorical.*reduction='sum'.*reduction='mean'"):
        PolicyKL(lambda: MODEL(X).reshape(6, 2, 3))
    with pytest.raises(ValueError, match=r"logits of shape \(6,\)"):
        PolicyKL(lambda: MODEL(X)[:, 0], reduction="mean")
    with pytest.raises(TypeError, match=r"fn returned a tensor of torch.int64"):
        PolicyKL(lambda: MODEL(X).reshape(6, 2, 3).long(), reduction="mean")


def test_an_unknown_reduction() -> None:
    """Is refused by name."""
    with pytest.raises(ValueError, match="reduction='max' is unknown; use 'sum', 'mean' or None"):
        PolicyKL(lambda: MODEL(X), reduction="max")


def rows_moved(old: nn.Module, new: nn.Module, factors: int) -> list[list[float]]:
    """The oracle: KL of every factor of every observation."""
    with torch.no_grad():
        here, there = (model(X).reshape(6, factors, -1).double().tolist() for model in (new, old))
    return [[reference.row_kl(c, p) for c, p in zip(*pair, strict=True)] for pair in zip(here, there, strict=True)]


SUM = pytest.warns(UserWarning, match=r"batch shape \(6, 2\).*added up.*reduction='sum'.*reduction='mean'")


@pytest.mark.parametrize(
    ("make", "reduction", "over", "warns"),
    [
        (lambda z: Categorical(logits=z), None, 1, True),
        (lambda z: Categorical(logits=z), "sum", 1, False),
        (lambda z: Categorical(logits=z), "mean", 2, False),
        (lambda z: OneHotCategorical(logits=z), None, 1, True),
        (lambda z: OneHotCategorical(logits=z), "mean", 2, False),
        (lambda z: Independent(Categorical(logits=z), 1), None, 1, False),
        (lambda z: Independent(Categorical(logits=z), 1), "mean", 1, False),
        (lambda z: Categorical(logits=z.reshape(12, 3)), None, 2, False),
        (lambda z: z, "sum", 1, False),
        (lambda z: z, "mean", 2, False),
        (lambda z: z.reshape(6, 2, 1, 3), "mean", 2, False),
    ],
)
def test_factors_are_added_and_tokens_averaged(make, reduction, over, warns) -> None:
    """The figure is what was asked for, and where nothing was, the sum; a warning says so once."""
    old, new = net(), net()

    def build() -> PolicyKL:
        return PolicyKL(lambda: make(new(X).reshape(6, 2, 3)), reduction=reduction)

    if warns:
        with SUM:
            kl = build()
    else:
        kl = build()
    kl.anchor()
    nudge(new, 0.1)
    wanted = rows_moved(old, new, 2)
    assert kl().mean == pytest.approx(sum(map(sum, wanted)) / 6 / over, rel=1e-4)
    assert kl.has_logits


def test_dimensions_of_a_gaussian_are_added_without_a_word() -> None:
    """Those of one action; the mean is there for whoever wants it, and leaves Independent's dimensions alone."""
    new = net()
    kls = [
        PolicyKL(lambda: Normal(new(X), 1.0)),
        PolicyKL(lambda: Normal(new(X), 1.0), reduction="mean"),
        PolicyKL(lambda: Independent(Normal(new(X).reshape(6, 2, 3), 1.0), 1), reduction="mean"),
    ]
    for kl in kls:
        kl.anchor()
    nudge(new, 0.1)
    total, each, group = (kl().mean for kl in kls)
    assert total == pytest.approx(6 * each, rel=1e-12)
    assert total == pytest.approx(2 * group, rel=1e-12)


def test_slices_of_factors() -> None:
    """A slice is a set of observations, with all their factors."""
    old, new = net(), net()
    kl = PolicyKL(lambda: Independent(Categorical(logits=new(X).reshape(6, 2, 3)), 1), {"two": [1, 4]})
    kl.anchor()
    nudge(new, 0.1)
    wanted = rows_moved(old, new, 2)
    assert kl().slices["two"] == pytest.approx((sum(wanted[1]) + sum(wanted[4])) / 2, rel=1e-4)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_projection_over_several_factors(reduction) -> None:
    """Project keeps every slice in its budget, for figures that are sums and for means."""
    old, new = net(), net()
    kl = PolicyKL(lambda: Categorical(logits=new(X).reshape(6, 2, 3)), {"a": [0, 1], "b": [2]}, reduction=reduction)
    optimizer = STEPOptimizer(
        torch.optim.SGD(new.parameters(), lr=1.0), kl=kl, budget=Budget(slices=0.01), controller=Project()
    )
    for i, p in enumerate(new.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    optimizer.step()
    assert optimizer.last.action is Action.PROJECT
    wanted = rows_moved(old, new, 2)
    over = 2 if reduction == "mean" else 1
    assert optimizer.last.accepted.slices["b"] == pytest.approx(sum(wanted[2]) / over, rel=1e-3)
    assert 0.005 < optimizer.last.accepted.worst[1] <= 0.01


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_mixtures_and_distances_on_another_default_device(reduction) -> None:
    """What Project asks of the closure is where the policy is; a mixture's KL is the figure that an audit has of it."""
    new = net()
    with torch.device("meta"):
        kl = PolicyKL(lambda: Categorical(logits=new(X).reshape(6, 2, 3)), reduction=reduction)
        kl.anchor()
    nudge(new, 0.1)
    with torch.device("meta"):
        audit = kl.audit()
        strength = torch.ones(6, device="cpu")
        found = kl.prompt_kl(audit, strength)
        again, loss, _ = kl.distill(audit, strength, list(new.parameters()))
        assert kl.distance(audit, audit) == 0.0
    assert found.tolist() == pytest.approx(audit.movement.prompts, rel=1e-5)
    assert again.movement == audit.movement
    assert loss == 0.0


def test_the_floor_of_float32_is_far_below_any_budget_and_that_of_bfloat16_is_not() -> None:
    """Wherever the rounding is: in the weights, in an autocast, in what the function returns."""
    wide, narrow, many = net(), net(dtype=BF16), torch.randn(500, 8, generator=torch.Generator().manual_seed(1))

    def autocast() -> Tensor:
        with torch.autocast("cpu", BF16):
            return wide(X).float()

    floors = [
        PolicyKL(lambda: wide(X)).noise_floor,
        PolicyKL(lambda: Normal(wide(X), 1.0)).noise_floor,
        PolicyKL(lambda: narrow(X.to(BF16))).noise_floor,
        PolicyKL(autocast).noise_floor,
        PolicyKL(lambda: wide(many).to(BF16)).noise_floor,
    ]
    assert [floor.measured.mean < 1e-12 for floor in floors] == [True, True, False, False, False]
    assert all(floor.measured.mean > floor.expected for floor in floors[2:])
    assert all(floor.measured.mean > 8 * floor.expected for floor in floors[3:])
    assert [floor.dtype for floor in floors] == [torch.float32, torch.float32, BF16, torch.float32, torch.float32]


def test_the_floor_is_what_movements_of_nothing_read() -> None:
    """One ulp of single weights, written by hand, reads about the floor, and never ten times as much."""
    model = net(dtype=BF16)
    kl = PolicyKL(lambda: Normal(model(X.to(BF16)), 1.0))
    readings = []
    for layer in (0, 2, 4):
        for i in (0, 17, 40):
            kl.anchor()
            weight = model[layer].weight.detach().view(-1)
            kept = weight[i].clone()
            weight[i] *= 1 + torch.finfo(BF16).eps
            readings.append(kl().mean)
            weight[i] = kept
    assert max(readings) < 10 * kl.noise_floor.measured.mean
    assert max(readings) > kl.noise_floor.measured.mean / 100


def test_a_budget_below_the_floor_warns() -> None:
    """As with TokenKL."""
    model = net(dtype=BF16)
    kl = PolicyKL(lambda: model(X.to(BF16)), {"a": [0, 1]})
    with pytest.warns(UserWarning, match=rf"mean: budget 1e-12, noise floor {kl.noise_floor.measured.mean:.3g}"):
        STEPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), kl=kl, budget=1e-12)
    assert set(kl.noise_floor.measured.slices) == {"a"}


def test_measuring_leaves_no_trace() -> None:
    """Parameters are the same objects with the same bits, untouched; an error in the middle changes nothing of that."""
    model = net()
    before = {name: (p, p.data_ptr(), p._version, bits(p)) for name, p in model.named_parameters()}
    calls = 0

    def fn() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise KeyboardInterrupt
        return model(X)

    for failing in (0, 4, 5, 7):
        calls = 0
        if failing:
            with pytest.raises(KeyboardInterrupt):
                PolicyKL(fn)
        else:
            PolicyKL(fn)
            assert calls == 4 + len(SIZES)
        for name, p in model.named_parameters():
            assert (p, p.data_ptr(), p._version, bits(p)) == before[name]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64])
def test_a_tied_weight_is_moved_in_all_places_alike(dtype) -> None:
    """One stand-in for all of them; afterwards each has the weight itself, with the bits that it had."""
    first, second = nn.Linear(64, 64, bias=False).to(dtype), nn.Linear(64, 64, bias=False).to(dtype)
    own = second.weight = first.weight
    before = bits(own)
    (weight,) = trained_weights([first.weight, second.weight])
    with standing_in([first, second], {id(weight): moved_by(weight, SIZES[0])}) as originals:
        assert first.weight is second.weight is not own
        assert originals[id(second)]["weight"] is own
    assert first.weight is second.weight is own
    assert bits(own) == before
    assert originals == {}


@pytest.mark.parametrize(
    "still",
    [
        lambda frozen, model: lambda: frozen(X),
        lambda frozen, model: lambda: frozen(X) + 0 * model(X),
        lambda frozen, model: lambda: Normal(frozen(X), model(X).square().clamp_min(1e9)),
        lambda frozen, model: lambda: model(X)[:, :1] + frozen(X),
    ],
)
def test_a_policy_that_nothing_trained_moves_is_warned_of(still) -> None:
    """Frozen, cut off, saturated, or a shift of all logits: it would read 0 for ever."""
    frozen, model = net().requires_grad_(False), net()
    with pytest.warns(UserWarning, match=r"nothing that is trained moves this policy.*noise_floor=False"):
        kl = PolicyKL(still(frozen, model))
    assert kl.noise_floor is None
    _, found = warned(lambda: PolicyKL(still(frozen, model), noise_floor=False))
    assert found == []


class Shifted(nn.Module):
    """A frozen network, and a trained bias that only its own method adds."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.bias = net().requires_grad_(False), nn.Parameter(torch.zeros(6))

    def act(self) -> Tensor:
        """Logits, by no call of this module."""
        return self.net(X) + self.bias


@pytest.mark.parametrize("kind", ["bare", "functional", "method", "method, model="])
def test_weights_that_the_modules_do_not_hold_are_no_reason_to_warn(kind) -> None:
    """A graph leads to them: their floor is not known, but the policy moves."""
    model, shifted = net(), Shifted()
    bare = nn.Parameter(torch.zeros(6))
    parameters = dict(model.named_parameters())
    make: dict[str, Callable[[], PolicyKL]] = {
        "bare": lambda: PolicyKL(lambda: shifted.net(X) + bare),
        "functional": lambda: PolicyKL(lambda: functional_call(model, parameters, (X,))),
        "method": lambda: PolicyKL(shifted.act),
        "method, model=": lambda: PolicyKL(shifted.act, model=shifted),
    }
    kl, found = warned(make[kind])
    assert found == []
    assert (kl.noise_floor is None) == (kind != "method, model=")


def test_a_function_that_calls_no_module_has_no_floor() -> None:
    """There is nothing to move without writing to it."""
    table = nn.Parameter(torch.randn(4, 3))
    calls = 0

    def fn() -> Tensor:
        nonlocal calls
        calls += 1
        return table

    kl, found = warned(lambda: PolicyKL(fn))
    assert (kl.noise_floor, found, calls) == (None, [], 3)


def test_a_policy_that_jumps_has_no_floor() -> None:
    """What the smallest movement reads like the largest is no rounding: signs of weights, as Householder's are."""

    class Signs(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (self.weight == 1).float().mean()

    model = Signs(8, 3)
    nn.init.ones_(model.weight)
    assert PolicyKL(lambda: model(X)).noise_floor is None


class Adapted(nn.Module):
    """A frozen network in bf16 with a float32 adapter that begins at 0, and a scale that must stay above 0."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.net = net(dtype=BF16).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.zeros(4, 6))
        self.scale = nn.Parameter(torch.full((6,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return (self.net(x.to(BF16)) + (x @ self.a @ self.b).to(BF16)).float()


def test_an_adapter_that_is_still_zero_is_moved_through_the_casts_behind_it() -> None:
    """Its floor is that of bf16: from B = 0, small movements of A would read nothing, and those of B no rounding."""
    torch.manual_seed(0)
    model = Adapted()
    floor = PolicyKL(lambda: model(X)).noise_floor
    assert floor.measured.mean > 1e-8
    assert floor.measured.mean > floor.expected
    assert bool((model.b == 0).all())


def test_weights_that_may_not_be_moved_away_are_moved_from_where_they_are() -> None:
    """A scale of 0.01 beside weights of 1 would be below 0 a tenth of the norm away: no distribution, and no error."""
    table = nn.Linear(1, 40, bias=False)
    with torch.no_grad():
        table.weight.fill_(1.0)[::2] = 0.01
    kl = PolicyKL(lambda: Normal(X[:, :1], table(torch.ones(6, 1))))
    assert kl.noise_floor.measured.mean < 1e-10
    with torch.no_grad():
        table.weight.clamp_(max=0.01)
    assert PolicyKL(lambda: Normal(X[:, :1], table(torch.ones(6, 1)))).noise_floor.measured.mean < 1e-10


def test_outputs_that_are_parameters_or_buffers_are_copied() -> None:
    """References stay what they were when training writes to what the function returned, in float64 too."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
            self.register_buffer("scale", torch.ones(4, 3, dtype=torch.float64))

    makers: list[Callable[[Table], Tensor | Distribution]] = [
        lambda t: t.logits,
        lambda t: Normal(t.logits, t.scale),
        lambda t: Categorical(probs=t.scale),
        lambda t: Bernoulli(logits=t.logits),
    ]
    for make in makers:
        table = Table()
        kl = PolicyKL(lambda make=make, table=table: make(table))
        kl.anchor()
        with torch.no_grad():
            table.logits[:, 0] += 1
            table.scale[:, 0] *= 2
        assert kl().mean > 1e-2


def test_the_log_says_what_is_measured(tmp_path) -> None:
    """The first line has the class, the figure and the noise floor."""
    model = net()
    optimizer = STEPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        kl=PolicyKL(lambda: Independent(Categorical(logits=model(X).reshape(6, 2, 3)), 1)),
        budget=1.0,
        controller=Gate(),
        log=tmp_path / "run.jsonl",
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    audit = json.loads((tmp_path / "run.jsonl").read_text().split("\n")[0])["audit"]
    assert audit["policy"] == "Independent(Categorical)"
    assert audit["observations"] == 6
    assert audit["figure"] == "sum of 2 KLs of an observation"
    assert audit["noise_floor"]["dtype"] == "float32"
    mean = PolicyKL(lambda: Categorical(logits=model(X).reshape(6, 2, 3)), reduction="mean")
    assert mean.describe()["figure"] == "mean over 2 KLs of an observation"
