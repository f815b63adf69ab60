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
from torch import Tensor, nn
from torch.distributions import (
    AbsTransform,
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
    Kumaraswamy,
    Laplace,
    LogisticNormal,
    LogNormal,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    OneHotCategoricalStraightThrough,
    Pareto,
    Poisson,
    RelaxedBernoulli,
    RelaxedOneHotCategorical,
    SigmoidTransform,
    StudentT,
    TanhTransform,
    TransformedDistribution,
    Uniform,
    VonMises,
    Weibull,
    Wishart,
    register_kl,
)

from step_optim import PolicyKL
from step_optim.audit.parameters import tensors_of

N = 2
"""Observations."""

SHAPES = [(N,), (N, 3), (N, 2, 2)]

TOLERANCE = 1e-5
"""What figures from 1e-10 nats on are good to: float32 sums of logits, and float64 with 10 digits to spare."""

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
        (a - b) * mpmath.digamma(a) - mpmath.loggamma(a) + mpmath.loggamma(b) + b * mpmath.log(c / d) + a * (d - c) / c
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
    return {name: x.clamp(0.02, 0.95) for name, x in drawn.items()}


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


def test_a_proportional_movement_of_large_concentrations() -> None:
    """Where the divergences of the parts and that of their sum are nearly equal, their difference is still right."""
    case = CASES["Dirichlet"]
    for concentration in (1.0, 100.0, 1e4):
        for size in (1e-5, 1e-3, 0.1, 3.0):
            before = {"concentration": torch.full((N, 4), concentration, dtype=torch.float64)}
            after = {"concentration": before["concentration"] * (1 + size)}
            wanted = case.oracle_mean(before, after, (N,))
            assert read(case.make, before, after) == pytest.approx(wanted, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["Uniform", "Pareto"])
@pytest.mark.parametrize("size", [1e-10, 1e-5, 0.1])
def test_a_support_that_shrinks_and_one_that_grows(name, size) -> None:
    """Inside the reference's support the KL is finite, and first order in the movement; outside it is infinite."""
    if name == "Uniform":
        wide, narrow = ({"low": torch.full((N,), -h), "high": torch.full((N,), h)} for h in (1.0, 1 - size))
    else:
        wide, narrow = ({"scale": torch.full((N,), s), "alpha": torch.full((N,), 2.0)} for s in (1.0, 1 + size))
    wide, narrow = ({key: x.double() for key, x in each.items()} for each in (wide, narrow))
    if size == 1e-10:  # float32 would not hold it
        narrow = {
            key: x * (1 - 1e-10 if name == "Uniform" else 1 + 1e-10) if key != "alpha" else x for key, x in wide.items()
        }
    case = CASES[name]
    assert read(case.make, wide, narrow) == pytest.approx(case.oracle_mean(wide, narrow, (N,)), rel=TOLERANCE)
    assert read(case.make, narrow, wide) == math.inf


def softmax_pair(shape: tuple[int, ...], size: float, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits before and after a movement, with some actions masked."""
    g = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(*shape, 5, generator=g, dtype=torch.float64)
    z[..., 0] = 0.0
    masked = (torch.rand(z.shape, generator=g) < 0.3) & (torch.arange(5) > 0)
    y = z + size * torch.randn(z.shape, generator=g, dtype=torch.float64)
    return z.masked_fill(masked, -math.inf).to(dtype), y.masked_fill(masked, -math.inf).to(dtype)


CATEGORICAL: dict[str, Callable[[Tensor], Distribution]] = {
    "Categorical, logits": lambda z: Categorical(logits=z),
    "Categorical, probs": lambda z: Categorical(probs=z.softmax(-1)),
    "OneHotCategorical, logits": lambda z: OneHotCategorical(logits=z),
    "OneHotCategorical, probs": lambda z: OneHotCategorical(probs=z.softmax(-1)),
    "straight through": lambda z: OneHotCategoricalStraightThrough(logits=z),
    "Independent": lambda z: Independent(Categorical(logits=z), z.dim() - 2),
}


def weights_of(made: Distribution) -> dict[str, Tensor]:
    """What a categorical policy was made from, as torch has normalised it; what torch has added to it comes later."""
    made = made.base_dist if isinstance(made, Independent) else made
    made = getattr(made, "_categorical", made)
    name = next(name for name in vars(made) if name in ("probs", "logits"))
    return {name: getattr(made, name)}


@pytest.mark.parametrize("name", CATEGORICAL)
@settings(max_examples=15)
@given(
    shape=st.sampled_from(SHAPES),
    size=st.floats(-5, 1).map(lambda exponent: 10**exponent),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_categorical_figures_equal_the_oracle(name, shape, size, seed, dtype) -> None:
    """Any batch shape, logits or probabilities, masked actions: the factors' KLs are added, and can be projected."""
    if name not in ("Categorical, logits", "Independent") and dtype == torch.bfloat16:
        dtype = torch.float32  # torch refuses probabilities that add up to 1 in bfloat16 only, also those of logits
    pair = softmax_pair(shape, size, seed, dtype)
    before, after = (weights_of(CATEGORICAL[name](z)) for z in pair)
    wanted = Case(Categorical, {}, kl_categorical).oracle_mean(before, after, shape)
    moved = read(lambda z: CATEGORICAL[name](z), {"z": pair[0]}, {"z": pair[1]}, reduction="sum")
    assert moved == pytest.approx(wanted, rel=TOLERANCE, abs=1e-13)
    assert PolicyKL(lambda: CATEGORICAL[name](pair[0]), reduction="sum").has_logits


@pytest.mark.parametrize("given_as", ["probs", "logits"])
def test_what_torch_adds_to_a_distribution_later_is_not_read(given_as) -> None:
    """A policy whose entropy was taken has both; what it was made from is exact at certain and impossible actions."""
    odds = {"probs": [[0.0, 1.0], [0.5, 0.5]], "logits": [[-math.inf, 0.0], [0.0, 0.0]]}[given_as]
    for cls, values in ((Categorical, odds), (Bernoulli, [row[0] for row in odds])):
        tensor = torch.tensor(values)

        def touched(cls: type = cls, tensor: Tensor = tensor) -> Distribution:
            made = cls(**{given_as: tensor}, validate_args=False)
            assert made.probs.shape == made.logits.shape
            return made

        kl = PolicyKL(touched)
        kl.anchor()
        assert kl().mean == 0.0


@pytest.mark.parametrize("cls", [Bernoulli, Binomial, Geometric])
def test_certain_coins(cls) -> None:
    """Probabilities of 1 and 0 are exact: -log(1/2) towards certainty, inf away from it."""
    certain, even = torch.ones(N, 2), torch.full((N, 2), 0.5)
    assert read(cls_probs(cls), {"probs": even}, {"probs": certain}) == pytest.approx(2 * math.log(2))
    assert read(cls_probs(cls), {"probs": certain}, {"probs": even}) == math.inf
    if cls is not Geometric:
        assert read(cls_probs(cls), {"probs": even}, {"probs": 0 * certain}) == pytest.approx(2 * math.log(2))
        assert read(cls_probs(cls), {"probs": 0 * certain}, {"probs": even}) == math.inf


def cls_probs(cls: type) -> Callable[..., Distribution]:
    """Make one from probabilities."""
    return (lambda probs: Binomial(1, probs=probs)) if cls is Binomial else cls


def test_rates_of_zero() -> None:
    """A Poisson policy that is certain of 0, before and after."""
    zero, one = torch.zeros(N), torch.ones(N)
    assert read(Poisson, {"rate": one}, {"rate": zero}) == 1.0
    assert read(Poisson, {"rate": zero}, {"rate": one}) == math.inf


AROUND: dict[str, Callable[[Tensor, Tensor], Distribution]] = {
    "Independent": lambda m, s: Independent(Normal(m, s), 2),
    "nested": lambda m, s: Independent(Independent(Normal(m, s), 1), 1),
    "tanh": lambda m, s: TransformedDistribution(Normal(m, s), [TanhTransform(cache_size=1)]),
    "inside and outside": lambda m, s: Independent(
        TransformedDistribution(Independent(Normal(m, s), 1), [TanhTransform(), AffineTransform(1.0, 2.0)]), 1
    ),
    "constant tensors": lambda m, s: TransformedDistribution(
        Normal(m, s), [SigmoidTransform().inv.inv, AffineTransform(torch.ones(2), torch.full((2,), 3.0))]
    ),
    "expanded": lambda m, s: Independent(Normal(m[:1], s[:1]), 2).expand((N,)),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("size", [1e-5, 1e-2, 1.0])
def test_what_is_around_a_distribution(name, size) -> None:
    """Independent dimensions add up, bijections change nothing, new transform objects at every call are the same."""
    before, after = CASES["Normal"].draw((N, 3, 2), size, 1, torch.float32)
    if name == "expanded":
        before, after = ({key: x[:1].expand(N, 3, 2) for key, x in each.items()} for each in (before, after))
    wanted = CASES["Normal"].oracle_mean(before, after, (N, 3, 2))
    moved = read(lambda loc, scale: AROUND[name](loc, scale), before, after)
    assert moved == pytest.approx(wanted, rel=TOLERANCE)


class Custom(Distribution):
    """A distribution whose KL somebody has registered."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)


@register_kl(Custom, Custom)
def _kl_custom(p: Custom, q: Custom) -> Tensor:
    return (p.loc - q.loc) ** 2 / 2


class OwnNormal(Normal):
    """A subclass with a KL of its own."""


@register_kl(OwnNormal, OwnNormal)
def _kl_own(p: OwnNormal, q: OwnNormal) -> Tensor:
    return 7 * (p.loc - q.loc) ** 2


class PlainNormal(Normal):
    """A subclass without."""


@pytest.mark.parametrize(("cls", "factor"), [(Custom, 0.5), (OwnNormal, 7.0), (PlainNormal, 0.5)])
def test_classes_that_torch_does_not_know(cls, factor) -> None:
    """A registered KL is taken, in float64; a subclass is read like the class that it derives from."""
    make = Custom if cls is Custom else lambda loc: cls(loc, torch.ones(N))
    before, after = {"loc": torch.zeros(N)}, {"loc": torch.full((N,), 1e-4)}
    assert read(make, before, after) == pytest.approx(factor * 1e-8, rel=TOLERANCE)


Z = torch.linspace(-1, 1, 6).reshape(2, 3)
S = Z.exp()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureSameFamily(Categorical(logits=Z), Normal(Z, S)), "MixtureSameFamily"),
        (lambda: Independent(VonMises(Z, S), 1), r"Independent\(VonMises\)"),
        (lambda: RelaxedOneHotCategorical(torch.tensor(1.0), logits=Z), "RelaxedOneHotCategorical"),
        (lambda: RelaxedBernoulli(torch.tensor(1.0), logits=Z), "RelaxedBernoulli"),
        (lambda: StudentT(S), "StudentT"),
        (
            lambda: TransformedDistribution(Normal(Z, S), [AbsTransform()]),
            "TransformedDistribution with AbsTransform.*maps several values to one",
        ),
    ],
)
def test_what_has_no_closed_form_is_refused(make, message) -> None:
    """At construction, with the class and a way out."""
    with pytest.raises(TypeError, match=rf"fn returned {message}.*has no closed form"):
        PolicyKL(make)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda z: TransformedDistribution(Normal(0 * z.detach(), 1.0), [AffineTransform(z, 1.0)]),
        lambda z: Independent(TransformedDistribution(Normal(0 * z.detach(), 1.0), [AffineTransform(0, z.exp())]), 1),
        lambda z: Kumaraswamy(z.exp(), z.exp()),
    ],
)
def test_transforms_that_are_trained_are_refused(make, bare) -> None:
    """At construction, whether a module or a bare parameter is behind them."""
    net, x = nn.Linear(3, 3), torch.eye(3)
    with pytest.raises(ValueError, match=r"transforms of fn's .* move with the weights.*Normal\(loc, scale\)"):
        PolicyKL(lambda: make(net.weight if bare else net(x)))


def test_transforms_that_move_later_are_refused_then() -> None:
    """Where no graph tells of it, the reading that would be wrong is an error."""
    scale = torch.ones(2)
    kl = PolicyKL(lambda: TransformedDistribution(Normal(Z, S), [AffineTransform(0.0, float(scale[0]))]))
    kl.anchor()
    assert kl().mean == 0.0
    scale.mul_(2)
    with pytest.raises(ValueError, match="transforms of fn's TransformedDistribution"):
        kl()


def test_another_class_or_shape_is_refused() -> None:
    """The observations being as many, the policy has to be comparable."""
    made = [Normal(Z, S)]
    kl = PolicyKL(lambda: made[0])
    kl.anchor()
    for other in (Laplace(Z, S), Normal(Z[:, :2], S[:, :2]), Categorical(logits=Z)):
        made[0] = other
        with pytest.raises(ValueError, match=r"fn returned .*Normal .* at first.*keep class and shape fixed"):
            kl()


def test_a_binomial_that_counts_further() -> None:
    """More trials leave the support; fewer have no closed form."""
    count = [3]
    kl = PolicyKL(lambda: Binomial(count[0], logits=Z))
    kl.anchor()
    count[0] = 4
    assert kl().mean == math.inf
    count[0] = 2
    with pytest.raises(ValueError, match="total_count of fn's Binomial has become smaller"):
        kl()


@EVERY
def test_pi_ref_of_an_older_version_is_read(name) -> None:
    """Checkpoints that have all tensors of the distribution object, in float64, by attribute path."""
    case = CASES[name]
    before, after = case.draw((N, 2), 0.1, 3, torch.float32)
    source = Source(case.make, before)
    kl = PolicyKL(source)
    kl.anchor()
    old = {path: x.double() for path, x in tensors_of(source()).items()}
    source.parameters = after
    resumed = PolicyKL(source)
    resumed.load_state_dict({"tensors": old})
    resumed.anchor()
    kl.anchor(kl.audit())
    if "covariance" in name or "precision" in name or name == "Wishart":  # theirs was a float32 Cholesky factor
        assert resumed.drift().mean == pytest.approx(kl.drift().mean, rel=1e-4)
    else:
        assert resumed.drift() == kl.drift()


@pytest.mark.parametrize("name", CATEGORICAL)
def test_categorical_pi_ref_of_an_older_version_is_read(name) -> None:
    """It was a distribution object where there were more factors, and logits [N, A] otherwise."""
    z, y = softmax_pair((N, 3), 0.1, 1, torch.float32)
    source = Source(lambda z: CATEGORICAL[name](z), {"z": z})
    kl = PolicyKL(source, reduction="sum")
    kl.anchor()
    old = {path: x.double() for path, x in tensors_of(source()).items()}
    source.parameters = {"z": y}
    kl.anchor(kl.audit())
    for state in ({"tensors": old}, kl.state_dict()):
        resumed = PolicyKL(source, reduction="sum")
        resumed.load_state_dict(state)
        resumed.anchor()
        assert resumed.drift() == kl.drift()


def test_pi_ref_of_another_class_is_refused() -> None:
    """Its tensors do not fit; nor do none."""
    kl = PolicyKL(lambda: Normal(Z, S))
    for state in ({"tensors": {"rate": S}}, {"x": Z}, {"tensors": {"loc": Z[:1], "scale": S[:1]}}):
        with pytest.raises(ValueError, match="does not have the shape of this policy"):
            kl.check_state_dict(state)
    for state in ({"tensors": 3}, {"y": Z}, {"tensors": {"loc": Z, "scale": S * math.nan}}):
        with pytest.raises(ValueError, match="damaged"):
            kl.check_state_dict(state)


@EVERY
def test_a_default_device_is_not_asked(name) -> None:
    """Tensors are where the policy is, whatever torch.set_default_device says."""
    before, after = CASES[name].draw((N, 2), 0.1, 0, torch.float32)
    here, there = CASES[name].make(**before), CASES[name].make(**after)
    made = [here]
    with torch.device("meta"):
        kl = PolicyKL(lambda: made[0])
        kl.anchor()
        made[0] = there
        moved = kl()
    assert moved.mean == pytest.approx(CASES[name].oracle_mean(before, after, (N, 2)), rel=TOLERANCE)
