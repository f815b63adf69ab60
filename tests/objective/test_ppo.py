"""PPO's own controls of KL: Ziegler's controller by hand, early stopping, the sampled estimate."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_optim.objective import AdaptiveKL, TargetKL, sampled_kl

numbers = st.floats(-10, 10) | st.floats(width=64, allow_nan=True, allow_infinity=True)


def restored(state):
    """Through a file, as a careful user reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_papers_update_by_hand() -> None:
    """The error is clip((KL - target) / target, -0.2, 0.2), the factor 1 + 0.1 of it; what is no number is skipped."""
    penalty = AdaptiveKL(0.5, target=0.1)
    beta = 0.5
    for kl, error in [(0.1, 0.0), (0.11, 0.1), (0.09, -0.1), (0.12, 0.2), (5.0, 0.2), (0.0, -0.2), (math.inf, 0.2)]:
        beta *= 1 + 0.1 * error
        assert penalty.update(torch.tensor(kl, dtype=torch.float64)) == pytest.approx(beta, rel=1e-12)
        assert penalty.coefficient == penalty.update(math.nan) == penalty.update(-math.inf)
    assert penalty.skips == 14


@given(
    st.floats(1e-37, 1e37),
    st.floats(1e-6, 1e3),
    st.floats(0, 1),
    st.floats(0.01, 0.99),
    st.lists(numbers, max_size=30),
)
def test_a_coefficient_stays_positive_and_moves_the_right_way(coefficient, target, rate, clip, kls) -> None:
    """Whatever is measured; and no update multiplies it by more than 1 ± rate * clip."""
    penalty = AdaptiveKL(coefficient, target, rate, clip)
    for kl in kls:
        before = penalty.coefficient
        after = penalty.update(kl)
        assert after == penalty.coefficient
        assert 0 < after < math.inf
        assert 1 - rate * clip - 1e-12 <= after / before <= 1 + rate * clip + 1e-12
        if math.isnan(kl) or kl == -math.inf:
            assert after == before
        else:
            assert (after - before) * (kl - target) >= 0 or after == before
    assert penalty.skips == sum(math.isnan(kl) or kl == -math.inf for kl in kls)


@pytest.mark.parametrize(("kl", "end"), [(math.inf, torch.finfo().max), (0.0, torch.finfo().tiny)])
def test_a_coefficient_can_always_come_back(kl, end) -> None:
    """After very many updates in one direction it is at an end of float32's range, and not stuck there."""
    penalty = AdaptiveKL(1.0, 0.1, rate=0.9, clip=0.9)
    for _ in range(1000):
        penalty.update(kl)
    assert penalty.coefficient == end
    penalty.update(0.0 if kl else 1.0)
    assert penalty.coefficient != end


@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=12), st.integers(0, 12))
def test_saved_state_goes_on_bit_for_bit(kls, at) -> None:
    """Of both controls, at any point."""
    straight, resumed = (AdaptiveKL(0.1, 0.05), TargetKL(0.1)), (AdaptiveKL(3.0, 0.05), TargetKL(0.1))
    for t, kl in enumerate([*kls, 0.3]):
        if t == min(at, len(kls)):
            for old, new in zip(straight, resumed, strict=True):
                new.load_state_dict(restored(old.state_dict()))
        for penalty, stopping in (straight, resumed):
            penalty.update(kl)
            stopping.exceeded(kl)
    assert straight == resumed


@pytest.mark.parametrize(
    "options",
    [
        {"coefficient": 0.0},
        {"coefficient": -1.0},
        {"coefficient": math.nan},
        {"coefficient": math.inf},
        {"coefficient": "0.1"},
        {"target": 0.0},
        {"target": -0.1},
        {"target": math.nan},
        {"target": math.inf},
        {"rate": -0.1},
        {"rate": math.nan},
        {"rate": 5.0},
        {"clip": 0.0},
        {"clip": math.inf},
        {"clip": math.nan},
    ],
    ids=str,
)
def test_bad_arguments_of_the_penalty_are_refused(options) -> None:
    """The message names the argument and its value."""
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        AdaptiveKL(**{"coefficient": 0.1, "target": 0.05} | options)


@pytest.mark.parametrize("options", [{"target": v} for v in (0.0, -1.0, math.nan)], ids=str)
def test_bad_targets_are_refused(options) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ValueError, match=f"target={options['target']}"):
        TargetKL(**options)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_bad_factors_are_refused(factor) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ValueError, match=f"factor={factor}"):
        TargetKL(0.1, factor)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"coefficient": 0.2}, "skips"),
        ({"skips": 1}, "coefficient"),
        ({"coefficient": 0.0, "skips": 1}, "coefficient.*0.0"),
        ({"coefficient": math.nan, "skips": 1}, "coefficient.*nan"),
        ({"coefficient": 0.2, "skips": -1}, "skips.*-1"),
    ],
)
def test_a_damaged_state_is_refused_before_anything_changes(state, message) -> None:
    """The message names the entry."""
    penalty = AdaptiveKL(0.1, 0.05)
    with pytest.raises(ValueError, match=message):
        penalty.load_state_dict(state)
    assert penalty == AdaptiveKL(0.1, 0.05)
    with pytest.raises(ValueError, match="stops"):
        TargetKL(0.1).load_state_dict({})


def test_stopping_is_at_more_than_the_factor_times_the_target() -> None:
    """The bound itself is allowed; NaN is not, and is all that an infinite target stops at."""
    stopping = TargetKL(0.5)
    kls = [0.0, 0.75, 0.7500001, math.inf, math.nan, -0.1, torch.tensor(0.8)]
    assert [stopping.exceeded(kl) for kl in kls] == [False, False, True, True, True, False, True]
    assert stopping.stops == 4
    off = TargetKL(math.inf)
    assert [off.exceeded(kl) for kl in (1e9, math.inf, math.nan)] == [False, False, True]
    assert TargetKL(0.5, factor=1).exceeded(0.6)


@given(
    st.lists(st.tuples(st.floats(-5, 5) | st.floats(-1e-5, 1e-5), st.booleans()), min_size=1, max_size=20).filter(
        lambda tokens: any(live for _, live in tokens)
    ),
    st.sampled_from([torch.bool, torch.float32, torch.int64]),
)
def test_the_sampled_kl_is_the_loop(tokens, kind) -> None:
    """The mean of (r - 1) - log r over live tokens, in float64 series where it cancels; padding may be NaN."""

    def k3(x: float) -> float:
        return x * x / 2 + x**3 / 6 + x**4 / 24 if abs(x) < 1e-3 else math.exp(x) - 1 - x

    live = [k3(x) for x, counts in tokens if counts]
    log_ratio = torch.tensor([x if counts else math.nan for x, counts in tokens], dtype=torch.float64)
    mask = torch.tensor([counts for _, counts in tokens]).to(kind)
    exact = sampled_kl(log_ratio, mask)
    assert exact.shape == ()
    assert float(exact) == pytest.approx(sum(live) / len(live), rel=1e-9, abs=1e-15)
    single = sampled_kl(log_ratio.float()[None], mask[None])
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(float(exact), rel=1e-4, abs=1e-7)
    assert single >= 0


def test_the_sampled_kl_estimates_the_kl() -> None:
    """Its expectation under the old policy is KL(old ‖ new)."""
    torch.manual_seed(0)
    old, new = torch.randn(2, 7).double().log_softmax(-1)
    tokens = torch.multinomial(old.exp(), 200_000, replacement=True)
    exact = float((old.exp() * (old - new)).sum())
    assert float(sampled_kl((new - old)[tokens])) == pytest.approx(exact, rel=0.02)


def test_the_sampled_kl_is_a_measurement() -> None:
    """No graph; bf16 is widened; NaN shows, and stops."""
    log_ratio = torch.full((2, 3), 0.1, requires_grad=True)
    assert not sampled_kl(log_ratio).requires_grad
    assert sampled_kl(log_ratio.bfloat16()).dtype == torch.float32
    assert sampled_kl(torch.tensor([0.0, math.nan])).isnan()
    assert sampled_kl(torch.tensor([0.0, -math.inf])) == math.inf


@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.1])
def test_the_sampled_kl_of_a_small_step_is_not_rounding(size) -> None:
    """In float32 too, where exp(log r) - 1 would be off by a tenth at 1e-3."""
    spread = torch.linspace(-size, size, 101)
    exact = sum(math.expm1(x) - x for x in spread.tolist()) / 101
    assert float(sampled_kl(spread)) == pytest.approx(exact, rel=1e-3)


def test_a_sampled_kl_of_nothing_is_refused() -> None:
    """A mean over no token, or over another mask's tokens."""
    with pytest.raises(ValueError, match=r"mask leaves no token"):
        sampled_kl(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask has the shape \(2,\), log_ratio \(2, 3\)"):
        sampled_kl(torch.zeros(2, 3), torch.ones(2))
