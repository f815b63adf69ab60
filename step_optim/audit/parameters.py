"""Which parameters of a torch.distributions object are kept, in float64, and which equation compares two of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Cauchy,
    ContinuousBernoulli,
    Dirichlet,
    Distribution,
    Exponential,
    Gamma,
    Geometric,
    Gumbel,
    Laplace,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    Pareto,
    Poisson,
    Uniform,
    Weibull,
    Wishart,
    kl_divergence,
)

from step_optim.audit import closed_forms
from step_optim.audit.closed_forms import Parameters

Reader = Callable[[Any], dict[str, Tensor]]
Equation = Callable[[Parameters, Parameters], Tensor]


def tensors_of(value: Tensor | Distribution, path: str = "") -> dict[str, Tensor]:
    """Tensors of a distribution and of those it is made of, by attribute path; a tensor by itself."""
    if isinstance(value, Tensor):
        return {path: value}
    found = {}
    for name, item in vars(value).items():
        if isinstance(item, Tensor):
            found[path + name] = item
        elif isinstance(item, Distribution):
            found |= tensors_of(item, f"{path}{name}.")
    return found


def float64_copy(tensor: Tensor) -> Tensor:
    """A copy in float64, if it is of floating point."""
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True)


def given(distribution: Distribution, *names: str) -> str:
    """Which of several attributes the distribution was made from: torch adds the others later, rounded and clamped."""
    return next(name for name in vars(distribution) if name in names)


def _attributes(*names: str) -> Reader:
    return lambda distribution: {name: tensors_of(distribution)[name] for name in names}


def _attributes_and_odds(*names: str) -> Reader:
    return lambda distribution: _attributes(*names, given(distribution, "probs", "logits"))(distribution)


def _attributes_and_tril(*names: str) -> Reader:
    """A Cholesky factor that was made in float64, whichever matrix was given."""

    def read(distribution: Any) -> dict[str, Tensor]:
        kind = given(distribution, "scale_tril", "covariance_matrix", "precision_matrix")
        matrix = _unexpanded(getattr(distribution, kind), distribution._unbroadcasted_scale_tril).double()
        if kind == "precision_matrix":
            matrix = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        tril = matrix.tril() if kind == "scale_tril" else torch.linalg.cholesky(matrix)
        return _attributes(*names)(distribution) | {"_unbroadcasted_scale_tril": tril}

    return read


def _unexpanded(matrix: Tensor, like: Tensor) -> Tensor:
    """A matrix that torch has expanded to the batch shape, in the shape that it had before."""
    return matrix[(0,) * (matrix.dim() - like.dim())][tuple(slice(size) for size in like.shape)]


def copies(distribution: Distribution) -> dict[str, Tensor]:
    """All tensors, of a class that is not in `FORMS`."""
    return tensors_of(distribution)


def torch_kl(distribution: Distribution) -> Equation:
    """The closed form that somebody has registered with torch, in float64: it may cancel at small movements."""

    def equation(p: Parameters, q: Parameters) -> Tensor:
        with torch.enable_grad():  # torch differentiates the log-normaliser of an exponential family
            return kl_divergence(filled(distribution, p), filled(distribution, q)).detach()

    return equation


def filled(distribution: Distribution, tensors: Parameters) -> Distribution:
    """A copy that has other tensors."""
    new = copy.deepcopy(distribution)
    names = {path.rpartition(".")[2] for path in tensors}
    if names & {"probs", "logits"}:  # torch keeps the one that was computed from the other
        for kept in {"probs", "logits"} - names:
            vars(new).pop(kept, None)
    for path, tensor in tensors.items():
        *parents, name = path.split(".")
        owner: Any = new
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, tensor)
    return new


_LOC_SCALE = _attributes("loc", "scale")
FORMS: dict[type, tuple[Reader, Equation]] = {
    Bernoulli: (_attributes_and_odds(), closed_forms.bernoulli),
    Beta: (_attributes("_dirichlet.concentration"), closed_forms.beta),
    Binomial: (_attributes_and_odds("total_count"), closed_forms.binomial),
    Cauchy: (_LOC_SCALE, closed_forms.cauchy),
    ContinuousBernoulli: (_attributes_and_odds(), closed_forms.continuous_bernoulli),
    Dirichlet: (_attributes("concentration"), closed_forms.dirichlet),
    Exponential: (_attributes("rate"), closed_forms.exponential),
    Gamma: (_attributes("concentration", "rate"), closed_forms.gamma),
    Geometric: (_attributes_and_odds(), closed_forms.geometric),
    Gumbel: (_LOC_SCALE, closed_forms.gumbel),
    Laplace: (_LOC_SCALE, closed_forms.laplace),
    LowRankMultivariateNormal: (
        _attributes("loc", "_unbroadcasted_cov_factor", "_unbroadcasted_cov_diag"),
        closed_forms.low_rank_normal,
    ),
    MultivariateNormal: (_attributes_and_tril("loc"), closed_forms.multivariate_normal),
    Normal: (_LOC_SCALE, closed_forms.normal),
    Pareto: (_attributes("scale", "alpha"), closed_forms.pareto),
    Poisson: (_attributes("rate"), closed_forms.poisson),
    Uniform: (_attributes("low", "high"), closed_forms.uniform),
    Weibull: (_attributes("scale", "concentration"), closed_forms.weibull),
    Wishart: (_attributes_and_tril("df"), closed_forms.wishart),
}
"""How each class is read, and the equation of its KL. Subclasses are read like the class they derive from."""
