"""KL of two distributions of one class, in forms that small movements do not drown in.

The textbook forms subtract terms that do not get smaller with the movement:
lgamma(100) = 359 has a rounding of 1e-13, which is 1e-3 of a KL of 1e-10. The
forms here add terms that are second order in the movement each, from
differences and ratios of the parameters, which float64 knows to its last bits.
They are exactly 0 at zero movement, and inf where the support was left.

p is the candidate, q the reference: parameters by their names in
torch.distributions, float64, in broadcastable shapes. Every form returns
KL(p ‖ q) in nats, in the batch shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from step_optim.audit.divergence import row_kl
from step_optim.audit.rows import Rows

Parameters = Mapping[str, Tensor]

NODES = 10
"""Of the quadrature. Its error is 5.8^-20 where a curvature's pole is as far from the path as the path is long."""

EULER = 0.57721566490153286061
"""-digamma(1)."""


def _gauss_legendre(count: int) -> list[tuple[float, float]]:
    """Nodes and weights on [0, 1] (Golub and Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64, device="cpu")
    beside = torch.diag(k / (4 * k**2 - 1).sqrt(), 1)
    nodes, vectors = torch.linalg.eigh(beside + beside.T)
    return list(zip(((nodes + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))


QUADRATURE = _gauss_legendre(NODES)


def growth(u: Tensor) -> Tensor:
    """e^u - 1 - u, the KL of many a ratio e^u of scales; never negative. Relative error 2e-16 / u."""
    return (torch.expm1(u) - u).clamp_min(0)


def bregman(curvature: Callable[[Tensor], Tensor], there: Tensor, here: Tensor) -> Tensor:
    """f(there) - f(here) - (there - here) f'(here) = d² ∫ (1 - t) f''(here + t d) dt over [0, 1], d = there - here.

    Nothing cancels in the integral, which is meant for a short d.
    """
    d = there - here
    total = torch.zeros_like(d)
    for t, weight in QUADRATURE:
        total += weight * (1 - t) * curvature(here + t * d)
    return d**2 * total


def lgamma_bregman(there: Tensor, here: Tensor) -> Tensor:
    """lgamma(there) - lgamma(here) - (there - here) digamma(here): the integral where that would cancel."""
    near = bregman(lambda x: torch.special.zeta(2.0, x), there, here)  # torch's trigamma is good to 1e-8
    far = there.lgamma() - here.lgamma() - (there - here) * here.digamma()
    return torch.where((there - here).abs() <= here / 2, near, far)


def normal(p: Parameters, q: Parameters) -> Tensor:
    """(v - 1 - log v) / 2 + ((m_p - m_q) / s_q)² / 2, v = (s_p / s_q)²."""
    return (growth(2 * (p["scale"] / q["scale"]).log()) + ((p["loc"] - q["loc"]) / q["scale"]) ** 2) / 2


def laplace(p: Parameters, q: Parameters) -> Tensor:
    """(r - 1 - log r) + r (e^-h - 1 + h), r = b_p / b_q, h = |m_p - m_q| / b_p."""
    r, h = p["scale"] / q["scale"], (p["loc"] - q["loc"]).abs() / p["scale"]
    return growth(r.log()) + r * growth(-h)


def cauchy(p: Parameters, q: Parameters) -> Tensor:
    """log(1 + ((s_p - s_q)² + (m_p - m_q)²) / (4 s_p s_q)) (Chyzak and Nielsen 2019)."""
    far = (p["scale"] - q["scale"]) ** 2 + (p["loc"] - q["loc"]) ** 2
    return torch.log1p(far / (4 * p["scale"] * q["scale"]))


def gumbel(p: Parameters, q: Parameters) -> Tensor:
    """`_gumbel` of r = b_p / b_q and m = (m_q - m_p) / b_q."""
    return _gumbel(p["scale"] / q["scale"], (q["loc"] - p["loc"]) / q["scale"])


def weibull(p: Parameters, q: Parameters) -> Tensor:
    """`_gumbel`: -log x of a Weibull variable x has a Gumbel distribution, m = -log(scale), b = 1 / concentration."""
    m = q["concentration"] * (p["scale"] / q["scale"]).log()
    return _gumbel(q["concentration"] / p["concentration"], m)


def _gumbel(r: Tensor, m: Tensor) -> Tensor:
    """(e^w - 1 - w) + (lgamma(r) + EULER (r - 1)), e^w = e^m Γ(1 + r); m and r - 1 are what moved."""
    one = torch.ones_like(r)
    w = m + lgamma_bregman(1 + r, one + 1) + (1 - EULER) * (r - 1)
    return growth(w) + lgamma_bregman(r, one)


def exponential(p: Parameters, q: Parameters) -> Tensor:
    """(r - 1 - log r), r = rate_q / rate_p."""
    return growth((q["rate"] / p["rate"]).log())


def gamma(p: Parameters, q: Parameters) -> Tensor:
    """a_p (e^u - 1 - u) + (a_p - a_q) u + (Bregman divergence of lgamma), u = log(rate_q / rate_p)."""
    a, b = p["concentration"], q["concentration"]
    u = (q["rate"] / p["rate"]).log()
    return a * growth(u) + (a - b) * u + lgamma_bregman(b, a)


def poisson(p: Parameters, q: Parameters) -> Tensor:
    """rate_p (r - 1 - log r), r = rate_q / rate_p; rate_q where rate_p is 0."""
    still = p["rate"] * growth((q["rate"] / p["rate"]).log())
    return torch.where(p["rate"] == 0, q["rate"], still)


def dirichlet(p: Parameters, q: Parameters) -> Tensor:
    """Bregman divergences of lgamma: those of the concentrations less that of their sum."""
    a, b = p["concentration"], q["concentration"]
    return lgamma_bregman(b, a).sum(-1) - lgamma_bregman(b.sum(-1), a.sum(-1))


def beta(p: Parameters, q: Parameters) -> Tensor:
    """`dirichlet` of two."""
    return dirichlet(*({"concentration": x["_dirichlet.concentration"]} for x in (p, q)))


def uniform(p: Parameters, q: Parameters) -> Tensor:
    """log(width_q / width_p), or inf."""
    wider = (q["high"] - p["high"]) + (p["low"] - q["low"])
    kl = torch.log1p(wider / (p["high"] - p["low"]))
    return torch.where((p["low"] < q["low"]) | (p["high"] > q["high"]), torch.inf, kl)


def pareto(p: Parameters, q: Parameters) -> Tensor:
    """(r - 1 - log r) + alpha_q log(scale_p / scale_q), r = alpha_q / alpha_p, or inf."""
    beyond = torch.log1p((p["scale"] - q["scale"]) / q["scale"])
    kl = growth((q["alpha"] / p["alpha"]).log()) + q["alpha"] * beyond
    return torch.where(p["scale"] < q["scale"], torch.inf, kl)


def bernoulli(p: Parameters, q: Parameters) -> Tensor:
    """`kl.row_kl` of two outcomes."""
    there, here = _two_outcomes(q), _two_outcomes(p)
    return row_kl(Rows(there.reshape(-1, 2)), Rows(here.reshape(-1, 2))).reshape(here.shape[:-1])


def binomial(p: Parameters, q: Parameters) -> Tensor:
    """total_count times `bernoulli`; inf if p counts further than q."""
    n, m = p["total_count"], q["total_count"]
    if bool((n < m).any()):
        raise ValueError("the total_count of fn's Binomial has become smaller; keep it as it is")
    return torch.where(n > m, torch.inf, n * bernoulli(p, q))


def geometric(p: Parameters, q: Parameters) -> Tensor:
    """`bernoulli` of one trial, times the number of trials that p needs: 1 / probs_p."""
    return bernoulli(p, q) / _two_outcomes(p)[..., 0].exp()


def _two_outcomes(p: Parameters) -> Tensor:
    """Log-probabilities of 1 and of 0, [..., 2]; exact for probabilities of 0 and 1."""
    if "probs" in p:
        return torch.stack([p["probs"].log(), torch.log1p(-p["probs"])], -1)
    return torch.stack([p["logits"], torch.zeros_like(p["logits"])], -1).log_softmax(-1)


def continuous_bernoulli(p: Parameters, q: Parameters) -> Tensor:
    """A(l_q) - A(l_p) - (l_q - l_p) A'(l_p) of the log-odds l, A(l) = log((e^l - 1) / l)."""
    here, there = (_log_odds(x) for x in (p, q))
    near = bregman(_spread, there, here)
    far = _log_norm(there) - _log_norm(here) - (there - here) * _log_norm_slope(here)
    return torch.where((there - here).abs() <= 1, near, far)


def _log_odds(p: Parameters) -> Tensor:
    return p["probs"].log() - torch.log1p(-p["probs"]) if "probs" in p else p["logits"]


FLAT = 0.1
"""|l| up to which A' and A'' are summed as series, for they would cancel."""


def _log_norm(x: Tensor) -> Tensor:
    """A."""
    size = x.abs()
    return x.clamp_min(0) + torch.where(size == 0, 0.0, (-torch.expm1(-size) / size).log())


def _log_norm_slope(x: Tensor) -> Tensor:
    """A' = 1 / (1 - e^-l) - 1 / l."""
    series = 0.5 + x / 12 - x**3 / 720 + x**5 / 30240
    direct = -1 / torch.expm1(-x) - 1 / x
    return torch.where(x.abs() < FLAT, series, direct)


def _spread(x: Tensor) -> Tensor:
    """A'' = 1 / l² - 1 / (2 sinh(l / 2))²."""
    size = x.abs()
    series = 1 / 12 - x**2 / 240 + x**4 / 6048
    direct = 1 / x**2 - torch.exp(-size) / torch.expm1(-size) ** 2
    return torch.where(size < FLAT, series, direct)


def multivariate_normal(p: Parameters, q: Parameters) -> Tensor:
    """`_scales` / 2 + |L_q⁻¹ (m_p - m_q)|² / 2, with Cholesky factors L."""
    there = q["_unbroadcasted_scale_tril"]
    step = torch.linalg.solve_triangular(there, (p["loc"] - q["loc"])[..., None], upper=False)
    scales, _ = _scales(p["_unbroadcasted_scale_tril"], there)
    kl: Tensor = (scales + step.square().sum((-2, -1))) / 2
    return kl


def low_rank_normal(p: Parameters, q: Parameters) -> Tensor:
    """`multivariate_normal` of the whole covariance, D x D: a difference of low-rank terms would cancel."""
    return multivariate_normal(*({"loc": x["loc"], "_unbroadcasted_scale_tril": _full_tril(x)} for x in (p, q)))


def _full_tril(p: Parameters) -> Tensor:
    factor = p["_unbroadcasted_cov_factor"]
    tril: Tensor = torch.linalg.cholesky(factor @ factor.mT + torch.diag_embed(p["_unbroadcasted_cov_diag"]))
    return tril


def wishart(p: Parameters, q: Parameters) -> Tensor:
    """n_p / 2 `_scales` + (n_p - n_q) / 2 log det(V_q⁻¹ V_p) + (Bregman divergences of lgamma), n the df."""
    n, m = p["df"], q["df"]
    here = p["_unbroadcasted_scale_tril"]
    scales, log_det = _scales(here, q["_unbroadcasted_scale_tril"])
    halves = torch.arange(here.shape[-1], dtype=n.dtype, device=n.device) / 2
    freedom = lgamma_bregman(m[..., None] / 2 - halves, n[..., None] / 2 - halves).sum(-1)
    return n / 2 * scales + (n - m) / 2 * log_det + freedom


def _scales(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Trace M - D - log det M, and log det M, for M = V_q⁻¹ V_p and V = L Lᵀ; here L_p, there L_q.

    With E = L_q⁻¹ (L_p - L_q), which is lower triangular, the first is the sum
    of the squares below E's diagonal and of e^u - 1 - u on it.
    """
    e = torch.linalg.solve_triangular(there, here - there, upper=False)
    u = 2 * (here.diagonal(dim1=-2, dim2=-1) / there.diagonal(dim1=-2, dim2=-1)).log()
    return growth(u).sum(-1) + e.tril(-1).square().sum((-2, -1)), u.sum(-1)


def log_probabilities(probs: Tensor) -> Tensor:
    """Float64 logits of probabilities [..., A]; -inf for 0, without a NaN in the gradient."""
    possible = probs > 0
    return torch.where(possible, torch.where(possible, probs.double(), 1.0).log(), -math.inf)
