"""PolicyKL over texts of several tokens, [N, T, A], of which some are padding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from step_optim import Budget, PolicyKL, Project, STEPOptimizer
from step_optim.controllers import Action
from tests import reference
from tests.models import nudge

X = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
"""Three texts of up to four tokens."""

MASK = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]]).bool()


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(5, 7)


def padded(model: nn.Module, mask: Tensor) -> Tensor:
    """Logits; those of padding are nothing at all."""
    return torch.where(mask[..., None], model(X), math.nan)


def text_kls(old: nn.Module, new: nn.Module, mask: Tensor) -> list[float]:
    """The oracle: the mean over the tokens of each text that count."""
    found = []
    for text, flags in zip(X, mask.tolist(), strict=True):
        with torch.no_grad():
            pairs = [(new.double()(x.double()).tolist(), old.double()(x.double()).tolist()) for x in text]
        kls = [reference.row_kl(*pair) for pair, counts in zip(pairs, flags, strict=True) if counts]
        found.append(sum(kls) / len(kls))
    return found


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4).filter(any), min_size=3, max_size=3))
def test_the_mean_is_over_the_tokens_that_count(flags) -> None:
    """Each text counts once, whatever its length, and padding not at all, NaN or not."""
    old, new, mask = net(), net(), torch.tensor(flags)
    makers = [lambda: padded(new, mask), lambda: Categorical(logits=new(X))]
    kls = [PolicyKL(make, {"two": [0, 2]}, reduction="mean", mask=mask, noise_floor=False) for make in makers]
    for kl in kls:
        kl.anchor()
        assert kl().mean == 0.0
    nudge(new, 0.2)
    wanted = text_kls(old, copy.deepcopy(new), mask)
    for kl in kls:
        moved = kl()
        assert moved.prompts == pytest.approx(wanted, rel=1e-4)
        assert moved.mean == pytest.approx(sum(wanted) / 3, rel=1e-4)
        assert moved.slices["two"] == pytest.approx((wanted[0] + wanted[2]) / 2, rel=1e-4)


def test_gradients_are_of_the_tokens_that_count() -> None:
    """Against autograd in float64."""
    old, new = net(), net()
    kl = PolicyKL(lambda: padded(new, MASK), reduction="mean", mask=MASK)
    kl.anchor()
    nudge(new, 0.2)
    twin = copy.deepcopy(new).double()
    here, there = twin(X.double()).log_softmax(-1), old.double()(X.double()).log_softmax(-1).detach()
    rows = (here.exp() * (here - there)).sum(-1) * MASK
    total = (rows.sum(1) / MASK.sum(1)).mean()
    wanted = torch.autograd.grad(total, list(twin.parameters()))
    (normal,) = kl.gradients(["mean"], list(new.parameters()))
    assert normal.value == pytest.approx(float(total.detach()), rel=1e-5)
    for found, gradient in zip(normal.gradient, wanted, strict=True):
        torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-8)


def test_projection_and_resume() -> None:
    """Project works on the rows that count, and the checkpoint has no others."""
    new = net()
    kl = PolicyKL(lambda: padded(new, MASK), {"a": [0], "b": [1, 2]}, reduction="mean", mask=MASK)
    optimizer = STEPOptimizer(
        torch.optim.SGD(new.parameters(), lr=0.3), kl=kl, budget=Budget(slices=0.01), controller=Project()
    )
    for i, p in enumerate(new.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    old = copy.deepcopy(new)
    optimizer.step()
    assert optimizer.last.action is Action.PROJECT
    moved = text_kls(old, copy.deepcopy(new), MASK)
    assert optimizer.last.accepted.mean == pytest.approx(sum(moved) / 3, rel=1e-3)
    state = kl.state_dict()
    assert state["x"].shape == (int(MASK.sum()), 7)
    resumed = PolicyKL(lambda: padded(new, MASK), reduction="mean", mask=MASK)
    resumed.load_state_dict(state)
    resumed.anchor()
    assert resumed.drift().prompts == kl.drift().prompts
    with pytest.raises(ValueError, match="does not have the shape of this policy"):
        PolicyKL(lambda: new(X), reduction="mean").load_state_dict(state)


def test_a_pool_has_a_mask_of_its_own() -> None:
    """As a PolicyKL of it."""
    new = net()
    pool = PolicyKL(lambda: padded(new, ~MASK), reduction="mean", mask=~MASK, noise_floor=False)
    kl = PolicyKL(lambda: padded(new, MASK), reduction="mean", mask=MASK, pool=pool)
    kl.anchor()
    assert kl.penalty(2).item() == pytest.approx(0.0, abs=1e-10)
    nudge(new, 0.1)
    assert kl.penalty(3).item() > 0


def test_the_log_says_that_lengths_differ() -> None:
    """Up to so many KLs are averaged."""
    model = net()
    kl = PolicyKL(lambda: model(X), reduction="mean", mask=MASK)
    assert kl.describe()["figure"] == "mean over up to 4 KLs of an observation"


REFUSED = {
    "no flags": (lambda z: z, "mean", MASK.long(), TypeError, r"mask=tensor.*is no tensor of flags"),
    "a list": (lambda z: z, "mean", MASK.tolist(), TypeError, "is no tensor of flags"),
    "a sum": (lambda z: z, "sum", MASK, ValueError, r"it needs reduction='mean' \(here 'sum'\)"),
    "another shape": (
        lambda z: z,
        "mean",
        MASK[:, :2],
        ValueError,
        r"mask has the shape \(3, 2\), the policy \(3, 4\)",
    ),
    "nothing counts": (
        lambda z: z,
        "mean",
        MASK & (MASK.sum(1) > 1)[:, None],
        ValueError,
        "observation 2 without a token",
    ),
    "a Gaussian": (lambda z: Normal(z, 1.0), "mean", MASK, ValueError, r"\(here Normal\)"),
    "factors": (
        lambda z: Independent(Categorical(logits=z[:, :, None].expand(3, 4, 2, 7)), 1),
        "mean",
        MASK,
        ValueError,
        r"\(here Independent\(Categorical\)\)",
    ),
}


@pytest.mark.parametrize("name", ["pool", "held_out"])
def test_other_observations_need_a_mask_of_their_own(name) -> None:
    """Their padding would count, in silence."""
    model = net()
    options = {"reduction": "mean", "mask": MASK, "noise_floor": False}
    with pytest.raises(ValueError, match=f"mask= says which of fn's tokens count, and not which of {name}'s"):
        PolicyKL(lambda: model(X), **options, **{name: lambda: model(X + 1)})


@pytest.mark.parametrize("what", REFUSED)
def test_a_mask_that_does_not_fit_is_refused(what) -> None:
    """By name, with what it needs."""
    make, reduction, mask, error, message = REFUSED[what]
    model = net()
    with pytest.raises(error, match=message):
        PolicyKL(lambda: make(model(X)), reduction=reduction, mask=mask, noise_floor=False)
