"""What `PolicyKL` keeps of a torch.distributions object, and which equation compares two of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Dirichlet,
    Distribution,
    Geometric,
    HalfCauchy,
    HalfNormal,
    Independent,
    OneHotCategorical,
    Transform,
    TransformedDistribution,
    kl_divergence,
)
from torch.distributions.kl import _KL_REGISTRY

from step_optim.audit.closed_forms import Parameters, log_probabilities
from step_optim.audit.parameters import FORMS, Equation, copies, filled, float64_copy, given, tensors_of, torch_kl
from step_optim.snapshot.tensors import same_bits


@dataclass(frozen=True)
class Kept:
    """A distribution, as float64 copies of its parameters: training reaches none of them."""

    path: str
    """Attribute path from the outermost distribution to the one with the parameters: "base_dist." or ""."""

    parameters: Parameters
    """By their attributes' names in that one."""

    batch_shape: tuple[int, ...]
    """Of that one: [N, ...]."""

    constants: tuple[Any, ...]
    """Numbers and tensors of the transforms around it."""

    equation: Equation

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(iter(self.parameters.values())).device

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by their whole path, as a checkpoint has them."""
        return {self.path + name: tensor for name, tensor in self.parameters.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Kept:
        """Return the same distribution with other parameters, given by whole paths."""
        new = {name: tensors[self.path + name].to(old) for name, old in self.parameters.items()}
        return replace(self, parameters=new)

    def kl(self, reference: Kept) -> Tensor:
        """KL(self ‖ reference) in the batch shape, float64 nats."""
        return self.equation(self.parameters, reference.parameters).double().expand(self.batch_shape).clamp_min(0)


@dataclass(frozen=True)
class Leaf:
    """The distribution inside of `Independent` and `TransformedDistribution`, which leave its KL as it is."""

    distribution: Distribution
    family: type
    """The class that says how it is read: its own, or one that it derives from."""

    name: str
    """The classes from the outermost on: "Independent(Normal)"."""

    path: str
    """Attribute path from the outermost: "base_dist." or ""."""

    transforms: tuple[Transform, ...]
    """Around it."""

    @property
    def is_categorical(self) -> bool:
        """Whether it is read as rows of logits."""
        return self.family in (Categorical, OneHotCategorical)

    @property
    def logits(self) -> Tensor:
        """Log-probabilities [N, ..., A] of a categorical policy, with their graph; normalised as torch has rounded."""
        ((name, given),) = self.odds.items()
        return log_probabilities(given) if name.endswith("probs") else given

    @property
    def odds(self) -> dict[str, Tensor]:
        """The probabilities or logits [N, ..., A] that a categorical policy was made from, by their whole path."""
        one_hot = self.family is OneHotCategorical
        inside = self.distribution._categorical if one_hot else self.distribution  # type: ignore[attr-defined]
        name = given(inside, "probs", "logits")
        return {self.path + ("_categorical." if one_hot else "") + name: getattr(inside, name)}

    @property
    def trains_transforms(self) -> bool:
        """Whether a graph leads from the transforms to something that is trained."""
        return any(isinstance(fact, Tensor) and fact.requires_grad for fact in _facts(self.transforms))

    @property
    def choices(self) -> int:
        """How many outcomes, or parts of a simplex, there are; 2 where they are not counted."""
        if self.is_categorical:
            return self.logits.shape[-1]
        return self.distribution.event_shape[-1] if self.family is Dirichlet else 2

    def kl(self, reference: Kept) -> Tensor:
        """KL(self ‖ reference) in the batch shape, nats, with the graph of the parameters."""
        reader, equation = FORMS.get(self.family, (copies, None))
        with torch.enable_grad():
            live = {n: t.double() if t.is_floating_point() else t for n, t in reader(self.distribution).items()}
            if equation is None or self.family in TWO_OUTCOMES:  # torch's form cancels, but its derivative does not
                frozen = {id(tensor): tensor.detach() for tensor in tensors_of(self.distribution).values()}
                still = copy.deepcopy(self.distribution, frozen)
                return kl_divergence(filled(still, live), filled(still, reference.parameters))
            return equation(live, reference.parameters).double().expand(self.distribution.batch_shape)

    def keep(self) -> Kept:
        """Copy the parameters."""
        reader, equation = FORMS.get(self.family, (copies, torch_kl(self.distribution)))
        with torch.no_grad():
            parameters = {name: float64_copy(tensor) for name, tensor in reader(self.distribution).items()}
            shape, constants = tuple(self.distribution.batch_shape), tuple(_facts(self.transforms))
        return Kept(self.path, parameters, shape, constants, equation)


def find_leaf(distribution: Distribution) -> Leaf:
    """Look into a distribution for the one that has the parameters.

    Raises:
        TypeError: its KL has no closed form.
    """
    layers = list(_layers(distribution))
    *around, inner = layers
    names, family = [type(layer).__name__ for layer in layers], _family(inner)
    name = "(".join(names) + ")" * len(around)
    if family is None:
        raise TypeError(
            f"fn returned {name}, and a KL between two {names[-1]} policies has no closed form in torch.distributions. "
            "Return logits [N, A] or a distribution that has one (Normal, Categorical, Beta, ...); or pass a plain "
            "function that returns an estimate of the KL as kl= instead of a PolicyKL"
        )
    transforms = [t for layer in around if isinstance(layer, TransformedDistribution) for t in layer.transforms]
    return Leaf(inner, family, name, "base_dist." * len(around), tuple(transforms))


def _layers(distribution: Any) -> Iterator[Distribution]:
    """The distribution, its base if it is one of `WRAPPERS`, and so on."""
    yield distribution
    while _family(distribution) in WRAPPERS:
        if isinstance(distribution, TransformedDistribution):
            _check_bijective(distribution)
        distribution = distribution.base_dist
        yield distribution


def _family(distribution: Distribution) -> type | None:
    """The class that says how it is read."""
    known = (cls for cls in type(distribution).__mro__ if cls in FORMS or cls in WRAPPERS or _has_kl(cls))
    return next(known, None)


def _has_kl(cls: type) -> bool:
    return (cls, cls) in _KL_REGISTRY


def _check_bijective(distribution: TransformedDistribution) -> None:
    if isinstance(distribution, (HalfNormal, HalfCauchy)):  # |x| of an x that is symmetric around 0
        return
    for transform in distribution.transforms:
        if not transform.bijective:
            raise TypeError(
                f"fn returned {type(distribution).__name__} with {transform}, which maps several values to one: the "
                f"KL of its {type(distribution.base_dist).__name__} is not that of what it returns, and has no closed "
                "form. Use a bijective transform, or return the distribution before it if that is the policy"
            )


def same_constants(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether the transforms of two distributions are the same, number by number."""
    return len(a) == len(b) and all(
        same_bits(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y) and x == y
        for x, y in zip(a, b, strict=True)
    )


NO_FACTS = ("_cached_x_y", "_inv", "training")
"""Attributes that do not say what a transform or a module in it computes."""


def _facts(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Classes, numbers and tensors that transforms compute with, in a fixed order; tensors are copies."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value.clone()
    elif isinstance(value, (bool, int, float, str, type(None))):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _facts(item, seen)
    elif isinstance(value, (Transform, Distribution, nn.Module)) and id(value) not in seen:
        seen.add(id(value))
        yield type(value)
        inverse = type(value).__name__ == "_InverseTransform"  # it is nothing but the inverse of its _inv
        for name, item in vars(value).items():
            if name not in NO_FACTS or (inverse and name == "_inv"):
                yield from _facts(item, seen)


WRAPPERS = (Independent, TransformedDistribution, HalfNormal)
"""Their KL is that of their base."""

TWO_OUTCOMES = (Bernoulli, Binomial, Geometric)
"""Their equations are that of rows of logits, which has no graph."""
