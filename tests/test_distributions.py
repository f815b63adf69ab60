"""PolicyKL over torch.distributions: every class that has a closed form, at small and large movements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Cauchy,
    Chi2,
    ContinuousBernoulli,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Geometric,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    Independent,
    InverseGamma,
    Laplace,
    LogisticNormal,
    LogNormal,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    OneHotCategoricalStraightThrough,
    Pareto,
    Poisson,
    SigmoidTransform,
    TanhTransform,
    TransformedDistribution,
    Uniform,
    Weibull,
    Wishart,
)

from step_optim import PolicyKL

N = 2
"""Observations."""

SHAPES = [(N,), (N, 3), (N, 2, 2)]

TOLERANCE = 1e-5
"""What figures from 1e-10 nats on are good to. Below that a difference of 1e-5 of float64 parameters is all there is."""

Numbers = dict[str, Any]
"""The parameters of one element of the batch, as nested lists of mpmath numbers."""


class Case:
    """One class of distributions.

    Args:
        make: from parameters to a distribution.
        centre: where the parameters are drawn, by name: (low, high, event shape).
        oracle: KL of two elements of the batch, the textbook's, with 50 digits.
        valid: brings drawn parameters into the domain.
    """

    def __init__(
        self,
        make: Callable[..., Distribution],
        centre: dict[str, tuple[float, float, tuple[int, ...]]],
        oracle: Callable[[Numbers, Numbers], Any],
        valid: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda drawn: drawn,
    ) -> None:
        self.make, self.centre, self.oracle, self.valid = make, centre, oracle, valid

    def draw(self, shape: tuple[int, ...], size: float, seed: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """Two sets of parameters that differ by ``size``, relative to themselves."""
        g = torch.Generator().manual_seed(seed)
        before, after = {}, {}
        for name, (low, high, event) in self.centre.items():
            x = low + (high - low) * torch.rand(*shape, *event, generator=g, dtype=torch.float64)
            if low > 0:
                x = low * (high / low) ** torch.rand(*shape, *event, generator=g, dtype=torch.float64)
            before[name], after[name] = x, x * (1 + size * (2 * torch.rand(x.shape, generator=g) - 1))
        return [{name: x.to(dtype) for name, x in self.valid(drawn).items()} for drawn in (before, after)]

    def oracle_mean(self, q: dict[str, Tensor], p: dict[str, Tensor], shape: tuple[int, ...]) -> float:
        """KL(p ‖ q), added up over the batch dimensions behind the first, mean over the first."""
        with mpmath.workdps(50):
            total = mpf(0)
            for index in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)).tolist():
                one = [{name: _numbers(x[tuple(index)]) for name, x in each.items()} for each in (p, q)]
                total += self.oracle(*one)
            return float(total / shape[0])


def _numbers(x: Tensor) -> Any:
    """Nested lists of mpmath numbers."""
    values = x.double().tolist()
    return mpmath.mpmathify(values) if isinstance(values, float) else _nested(values)


def _nested(values: Any) -> Any:
    return mpf(values) if isinstance(values, float) else [_nested(value) for value in values]


def kl_normal(p: Numbers, q: Numbers) -> Any:
    """Two Gaussians."""
    ratio = (p["scale"] / q["scale"]) ** 2
    away = (p.get("loc", mpf(0)) - q.get("loc", mpf(0))) / q["scale"]
    return (ratio + away**2 - 1 - mpmath.log(ratio)) / 2


def kl_laplace(p: Numbers, q: Numbers) -> Any:
    """Two Laplace distributions."""
    r, d = p["scale"] / q["scale"], abs(p["loc"] - q["loc"])
    return -mpmath.log(r) + d / q["scale"] + r * mpmath.exp(-d / p["scale"]) - 1


def kl_cauchy(p: Numbers, q: Numbers) -> Any:
    """Two Cauchy distributions."""
    d = p.get("loc", mpf(0)) - q.get("loc", mpf(0))
    return mpmath.log(((p["scale"] + q["scale"]) ** 2 + d**2) / (4 * p["scale"] * q["scale"]))


def kl_gumbel(p: Numbers, q: Numbers) -> Any:
    """Two Gumbel distributions."""
    r, m = p["scale"] / q["scale"], (q["loc"] - p["loc"]) / q["scale"]
    return -mpmath.log(r) + mpmath.euler * (r - 1) - m + mpmath.exp(m) * mpmath.gamma(1 + r) - 1


def kl_weibull(p: Numbers, q: Numbers) -> Any:
    """Two Weibull distributions."""
    k, j, a, b = p["concentration"], q["concentration"], p["scale"], q["scale"]
    return (
        mpmath.log(k / a**k)
        - mpmath.log(j / b**j)
        + (k - j) * (mpmath.log(a) - mpmath.euler / k)
        + (a / b) ** j * mpmath.gamma(j / k + 1)
        - 1
    )


def kl_exponential(p: Numbers, q: Numbers) -> Any:
    """Two exponential distributions."""
    r = q["rate"] / p["rate"]
    return r - 1 - mpmath.log(r)


def kl_gamma(p: Numbers, q: Numbers) -> Any:
    """Two gamma distributions."""
    a, b, c, d = p["concentration"], q["concentration"], p["rate"], q["rate"]
    return (
        (a - b) * mpmath.digamma(a)
        - mpmath.loggamma(a)
        + mpmath.loggamma(b)
        + b * mpmath.log(c / d)
        + a * (d - c) / c
    )


def kl_chi2(p: Numbers, q: Numbers) -> Any:
    """Two chi-squared distributions."""
    return kl_gamma(*({"concentration": x["df"] / 2, "rate": mpf(1) / 2} for x in (p, q)))


def kl_poisson(p: Numbers, q: Numbers) -> Any:
    """Two Poisson distributions."""
    return p["rate"] * mpmath.log(p["rate"] / q["rate"]) - p["rate"] + q["rate"]


def kl_dirichlet(p: Numbers, q: Numbers) -> Any:
    """Two Dirichlet distributions."""
    a, b = p["concentration"], q["concentration"]
    total = mpmath.loggamma(sum(a)) - mpmath.loggamma(sum(b))
    for x, y in zip(a, b, strict=True):
        total += mpmath.loggamma(y) - mpmath.loggamma(x)
        total += (x - y) * (mpmath.digamma(x) - mpmath.digamma(sum(a)))
    return total


def kl_beta(p: Numbers, q: Numbers) -> Any:
    """Two beta distributions."""
    return kl_dirichlet(*({"concentration": [x["concentration1"], x["concentration0"]]} for x in (p, q)))


def kl_uniform(p: Numbers, q: Numbers) -> Any:
    """Two uniform distributions, the first inside the second."""
    if p["low"] < q["low"] or p["high"] > q["high"]:
        return mpmath.inf
    return mpmath.log((q["high"] - q["low"]) / (p["high"] - p["low"]))


def kl_pareto(p: Numbers, q: Numbers) -> Any:
    """Two Pareto distributions."""
    if p["scale"] < q["scale"]:
        return mpmath.inf
    r = q["alpha"] / p["alpha"]
    return q["alpha"] * mpmath.log(p["scale"] / q["scale"]) - mpmath.log(r) + r - 1


def kl_outcomes(p: Sequence[Any], q: Sequence[Any]) -> Any:
    """Two distributions over finitely many outcomes, from weights that need not add up to 1."""
    s, t, total = sum(p), sum(q), mpf(0)
    for x, y in zip(p, q, strict=True):
        if x > 0 and y == 0:
            return mpmath.inf
        total += x / s * mpmath.log(x / s * t / y) if x > 0 else 0
    return total


def outcomes(p: Numbers) -> list[Any]:
    """Weights of all outcomes."""
    if "probs" in p:
        return p["probs"] if isinstance(p["probs"], list) else [p["probs"], 1 - p["probs"]]
    logits = p["logits"] if isinstance(p["logits"], list) else [p["logits"], mpf(0)]
    return [mpmath.exp(z) for z in logits]


def kl_categorical(p: Numbers, q: Numbers) -> Any:
    """Two categorical distributions, or coins."""
    return kl_outcomes(outcomes(p), outcomes(q))


def kl_binomial(p: Numbers, q: Numbers) -> Any:
    """Seven coins."""
    return 7 * kl_categorical(p, q)


def kl_geometric(p: Numbers, q: Numbers) -> Any:
    """Coins until the first success."""
    yes, no = outcomes(p)
    return kl_categorical(p, q) * (yes + no) / yes


def kl_continuous_bernoulli(p: Numbers, q: Numbers) -> Any:
    """Two continuous Bernoulli distributions, from their log-odds."""

    def odds(x: Numbers) -> Any:
        return x["logits"] if "logits" in x else mpmath.log(x["probs"] / (1 - x["probs"]))

    def log_norm(x: Any) -> Any:
        return mpmath.log(mpmath.expm1(x) / x) if x != 0 else mpf(0)

    here, there = odds(p), odds(q)
    mean = 1 / (1 - mpmath.exp(-here)) - 1 / here if here != 0 else mpf(1) / 2
    return log_norm(there) - log_norm(here) - (there - here) * mean


def covariance(p: Numbers) -> Any:
    """The covariance matrix, whichever way it was given."""
    if "covariance_matrix" in p:
        m = mpmath.matrix(p["covariance_matrix"])
        return mpmath.matrix(m.rows, m.cols) + _lower(m)  # the lower triangle counts, as in torch
    if "precision_matrix" in p:
        return mpmath.inverse(_lower(mpmath.matrix(p["precision_matrix"])))
    if "cov_factor" in p:
        w = mpmath.matrix(p["cov_factor"])
        return w * w.T + mpmath.diag(p["cov_diag"])
    tril = mpmath.matrix(p["scale_tril"])
    return tril * tril.T


def _lower(m: Any) -> Any:
    """The symmetric matrix that has this lower triangle."""
    return mpmath.matrix([[m[max(i, j), min(i, j)] for j in range(m.cols)] for i in range(m.rows)])


def kl_multivariate(p: Numbers, q: Numbers) -> Any:
    """Two multivariate Gaussians."""
    here, there = covariance(p), covariance(q)
    d = mpmath.matrix(p["loc"]) - mpmath.matrix(q["loc"])
    inverse = mpmath.inverse(there)
    trace = sum((inverse * here)[i, i] for i in range(here.rows))
    away = (d.T * inverse * d)[0]
    return (trace + away - here.rows + mpmath.log(mpmath.det(there) / mpmath.det(here))) / 2


def kl_wishart(p: Numbers, q: Numbers) -> Any:
    """Two Wishart distributions."""
    here, there, n, m = covariance(p), covariance(q), p["df"], q["df"]
    size = here.rows

    def log_gamma(x: Any) -> Any:
        return sum(mpmath.loggamma(x - mpf(j) / 2) for j in range(size))

    product = mpmath.inverse(there) * here
    trace = sum(product[i, i] for i in range(size))
    slope = sum(mpmath.digamma(n / 2 - mpf(j) / 2) for j in range(size))
    return (
        -m / 2 * mpmath.log(mpmath.det(product))
        + n / 2 * (trace - size)
        + log_gamma(m / 2)
        - log_gamma(n / 2)
        + (n - m) / 2 * slope
    )


def _positive(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Make one of the parameters a symmetric positive definite matrix."""

    def valid(drawn: dict[str, Tensor]) -> dict[str, Tensor]:
        x = drawn[name]
        matrix = x @ x.mT + torch.eye(x.shape[-1], dtype=x.dtype)
        return drawn | {name: (matrix + matrix.mT) / 2}

    return valid


def _tril(drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Cholesky factor."""
    x = drawn["scale_tril"]
    return drawn | {"scale_tril": x.tril(-1) + torch.diag_embed(x.diagonal(dim1=-2, dim2=-1).abs() + 0.3)}


def _inside(drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """Probabilities below 1."""
    return {name: x.clamp(1e-3, 0.99) for name, x in drawn.items()}


def _simplex(drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    """Probabilities that add up to 1."""
    return {name: x / x.sum(-1, keepdim=True) for name, x in drawn.items()}


LOC, SCALE, SMALL, LARGE = (-3.0, 3.0, ()), (0.05, 20.0, ()), (0.05, 5.0, ()), (0.05, 5000.0, ())
MATRIX = (-1.0, 1.0, (3, 3))
VECTOR = (-2.0, 2.0, (3,))

CASES = {
    "Normal": Case(Normal, {"loc": LOC, "scale": SCALE}, kl_normal),
    "HalfNormal": Case(HalfNormal, {"scale": SCALE}, kl_normal),
    "LogNormal": Case(LogNormal, {"loc": LOC, "scale": SCALE}, kl_normal),
    "LogisticNormal": Case(
        LogisticNormal,
        {"loc": (-2.0, 2.0, (3,)), "scale": (0.1, 5.0, (3,))},
        lambda p, q: sum(
            kl_normal({"loc": a, "scale": b}, {"loc": c, "scale": d})
            for a, b, c, d in zip(p["loc"], p["scale"], q["loc"], q["scale"], strict=True)
        ),
    ),
    "Laplace": Case(Laplace, {"loc": LOC, "scale": SCALE}, kl_laplace),
    "Cauchy": Case(Cauchy, {"loc": LOC, "scale": SCALE}, kl_cauchy),
    "HalfCauchy": Case(HalfCauchy, {"scale": SCALE}, kl_cauchy),
    "Gumbel": Case(Gumbel, {"loc": LOC, "scale": (0.3, 20.0, ())}, kl_gumbel),
    "Weibull": Case(Weibull, {"scale": SCALE, "concentration": (0.3, 3.0, ())}, kl_weibull),
    "Exponential": Case(Exponential, {"rate": LARGE}, kl_exponential),
    "Gamma": Case(Gamma, {"concentration": LARGE, "rate": SCALE}, kl_gamma),
    "InverseGamma": Case(InverseGamma, {"concentration": LARGE, "rate": SCALE}, kl_gamma),
    "Chi2": Case(Chi2, {"df": LARGE}, kl_chi2),
    "Poisson": Case(Poisson, {"rate": LARGE}, kl_poisson),
    "Beta": Case(Beta, {"concentration1": LARGE, "concentration0": LARGE}, kl_beta),
    "Dirichlet": Case(Dirichlet, {"concentration": (0.05, 5000.0, (4,))}, kl_dirichlet),
    "Uniform": Case(
        Uniform,
        {"low": LOC, "high": (4.0, 5.0, ())},
        kl_uniform,
        lambda drawn: drawn | {"high": drawn["high"].maximum(drawn["low"] + 1)},
    ),
    "Pareto": Case(Pareto, {"scale": SCALE, "alpha": SMALL}, kl_pareto),
    "Bernoulli, logits": Case(Bernoulli, {"logits": (-9.0, 9.0, ())}, kl_categorical),
    "Bernoulli, probs": Case(Bernoulli, {"probs": (1e-3, 0.9, ())}, kl_categorical, _inside),
    "Binomial": Case(lambda logits: Binomial(7, logits=logits), {"logits": (-9.0, 9.0, ())}, kl_binomial),
    "Geometric, logits": Case(Geometric, {"logits": (-4.0, 9.0, ())}, kl_geometric),
    "Geometric, probs": Case(Geometric, {"probs": (1e-3, 0.9, ())}, kl_geometric, _inside),
    "ContinuousBernoulli, logits": Case(ContinuousBernoulli, {"logits": (-20.0, 20.0, ())}, kl_continuous_bernoulli),
    "ContinuousBernoulli, flat": Case(ContinuousBernoulli, {"logits": (-0.2, 0.2, ())}, kl_continuous_bernoulli),
    "ContinuousBernoulli, probs": Case(
        ContinuousBernoulli, {"probs": (1e-3, 0.9, ())}, kl_continuous_bernoulli, _inside
    ),
    "MultivariateNormal, scale_tril": Case(
        MultivariateNormal, {"loc": VECTOR, "scale_tril": MATRIX}, kl_multivariate, _tril
    ),
    "MultivariateNormal, covariance": Case(
        MultivariateNormal,
        {"loc": VECTOR, "covariance_matrix": MATRIX},
        kl_multivariate,
        _positive("covariance_matrix"),
    ),
    "MultivariateNormal, precision": Case(
        MultivariateNormal, {"loc": VECTOR, "precision_matrix": MATRIX}, kl_multivariate, _positive("precision_matrix")
    ),
    "LowRankMultivariateNormal": Case(
        LowRankMultivariateNormal,
        {"loc": VECTOR, "cov_factor": (-1.0, 1.0, (3, 2)), "cov_diag": (0.1, 2.0, (3,))},
        kl_multivariate,
    ),
    "Wishart": Case(
        Wishart,
        {"df": (3.5, 50.0, ()), "covariance_matrix": MATRIX},
        kl_wishart,
        lambda drawn: _positive("covariance_matrix")(drawn) | {"df": drawn["df"].clamp_min(3.1)},
    ),
}
"""Every class of torch.distributions that is compared by its parameters."""

EVERY = pytest.mark.parametrize("name", CASES)


class Source:
    """A function for PolicyKL whose parameters can be exchanged."""

    def __init__(self, make: Callable[..., Distribution], parameters: dict[str, Tensor]) -> None:
        self.make, self.parameters = make, parameters

    def __call__(self) -> Distribution:
        """The distribution at the current parameters."""
        return self.make(**self.parameters)


def read(make: Callable[..., Distribution], before: dict[str, Tensor], after: dict[str, Tensor], **options) -> float:
    """What PolicyKL reads of a movement; also, that it reads 0 before and, kept as a reference, after."""
    source = Source(make, before)
    kl = PolicyKL(source, **options)
    kl.anchor()
    assert kl().mean == 0.0
    source.parameters = after
    moved = kl()
    kl.anchor()
    assert kl().mean == 0.0
    return moved.mean


@EVERY
@settings(max_examples=12)
@given(
    shape=st.sampled_from(SHAPES),
    size=st.floats(-5, 0).map(lambda exponent: 10**exponent),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_figure_equals_the_oracle(name, shape, size, seed, dtype) -> None:
    """From 1e-10 nats to far beyond 1, for every class, batch shape and dtype: the textbook's KL with 50 digits."""
    case = CASES[name]
    if dtype == torch.bfloat16 and ("tril" in name or "ariate" in name or name == "Wishart"):
        dtype = torch.float32  # torch has no Cholesky factors in bfloat16
    before, after = case.draw(shape, min(size, 0.9), seed, dtype)
    wanted = case.oracle_mean(before, after, shape)
    moved = read(case.make, before, after)
    if math.isinf(wanted):
        assert math.isinf(moved)
    else:
        assert moved == pytest.approx(wanted, rel=TOLERANCE, abs=1e-15)
