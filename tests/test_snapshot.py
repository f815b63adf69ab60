"""The way between two points: exact at both ends, in every dtype, and measured where it was rounded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim.snapshot import Weights
from tests.strategies import bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def two_points(seed: int, dtype: torch.dtype, scale: float) -> tuple[Weights, torch.nn.Parameter, object, object]:
    """Weights at a candidate, with theta_t behind them; and the bits of both."""
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(5, 3, dtype=dtype).t())
    weights = Weights(torch.optim.SGD([weight], lr=1.0))
    weights.capture()
    previous = bits(weight)
    with torch.no_grad():
        weight.add_(torch.randn(3, 5, dtype=dtype) * scale)
    weights.keep_candidate()
    return weights, weight, previous, bits(weight)


@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]),
    alphas=st.lists(st.floats(0, 1), max_size=4),
)
def test_both_ends_are_exact_wherever_one_comes_from(seed, dtype, scale, alphas):
    """At 0 the weights are theta_t, at 1 the candidate, bit for bit; every alpha gives the same bits each time."""
    weights, weight, previous, candidate = two_points(seed, dtype, scale)
    seen = {}
    for alpha in [*alphas, 0.0, *alphas, 1.0, *alphas, 0.0, 1.0]:
        weights.go(alpha)
        assert seen.setdefault(alpha, bits(weight)) == bits(weight)
    assert seen[0.0] == previous
    assert seen[1.0] == candidate


@given(seed=st.integers(0, 10_000), alpha=st.floats(0.01, 0.99), dtype=st.sampled_from(DTYPES[2:]))
def test_the_realised_alpha_is_the_one_asked_for_where_rounding_allows(seed, alpha, dtype):
    """In full precision the weights are where they were asked to be."""
    weights, _, _, _ = two_points(seed, dtype, 1.0)
    weights.go(alpha)
    along, length = weights.alignment()
    assert along / length == pytest.approx(alpha, rel=1e-4)


def test_an_update_is_measured_and_an_overflow_is_named():
    """The norm is that of the difference; a weight that became inf makes it not finite."""
    weight = torch.nn.Parameter(torch.zeros(2))
    weights = Weights(torch.optim.SGD([weight], lr=1.0))
    weights.capture()
    assert weights.update().read() == (False, 0.0)
    with torch.no_grad():
        weight.copy_(torch.tensor([3.0, 4.0]))
    assert weights.update().read() == (True, 25.0)
    with torch.no_grad():
        weight[0] = math.inf
    moved, square = weights.update().read()
    assert moved
    assert not math.isfinite(square)
