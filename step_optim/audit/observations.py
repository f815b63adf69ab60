"""Observations that a policy is measured on: tensors, copied, in nested dicts and tuples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from step_optim.snapshot.tensors import as_bits


class Observed:
    """A function of observations as one without arguments.

    Args:
        fn: takes the observations.
        observations: a tensor or an array [N, ...], or a nested dict, tuple or list of these. They are copied: a
            rollout's storage may be written again.

    Raises:
        TypeError: something else is in there.
        ValueError: no tensor, or other numbers of observations.

    >>> rows = Observed(lambda seen: seen["x"] * seen["mask"][:, None], {"x": torch.ones(2, 3), "mask": torch.ones(2)})
    >>> rows.count, rows().shape
    (2, torch.Size([2, 3]))
    """

    def __init__(self, fn: Callable[[Any], Any], observations: Any) -> None:
        self.fn = fn
        self.observations = copied(observations)
        self.count = count_of(self.observations)

    def __call__(self) -> Any:
        """Return what the function says of them."""
        return self.fn(self.observations)

    def take(self, other: Observed) -> None:
        """Take another one's observations."""
        self.observations, self.count = other.observations, other.count

    def digest(self) -> list[int]:
        """Sums of their bits, each with its place: equal for equal observations."""
        return [_digest(tensor) for _, tensor in leaves(self.observations)]


def copied(observations: Any, path: str = "observations") -> Any:
    """Copy nested observations; arrays become tensors.

    Raises:
        TypeError: something in there is neither a tensor nor an array, dict, tuple or list of these.
    """
    if isinstance(observations, Tensor):
        return observations.detach().clone()
    if isinstance(observations, Mapping):
        return {name: copied(value, f"{path}[{name!r}]") for name, value in observations.items()}
    if isinstance(observations, (tuple, list)):
        parts = [copied(value, f"{path}[{i}]") for i, value in enumerate(observations)]
        return type(observations)(*parts) if hasattr(observations, "_fields") else type(observations)(parts)
    if hasattr(observations, "__array__"):
        try:
            return torch.as_tensor(observations).clone()
        except (TypeError, ValueError) as error:
            raise TypeError(f"{path} is an array that torch cannot read ({error}); give numbers") from error
    raise TypeError(
        f"{path}={observations!r:.60} is no tensor and no array; give observations [N, ...], or a dict or tuple of them"
    )


def leaves(observations: Any, path: str = "observations") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested observations, each with where it is."""
    if isinstance(observations, Tensor):
        yield path, observations
        return
    pairs = observations.items() if isinstance(observations, Mapping) else enumerate(observations)
    for name, value in pairs:
        yield from leaves(value, f"{path}[{name!r}]")


def count_of(observations: Any) -> int:
    """Return N.

    Raises:
        ValueError: there is no tensor, none has a first dimension, or the first dimensions are not equal.
    """
    found = list(leaves(observations))
    if not found:
        raise ValueError("observations has no tensor in it; give at least one, [N, ...]")
    first, tensor = found[0]
    for path, other in found:
        if not other.shape or other.shape[0] == 0:
            raise ValueError(
                f"{path} has the shape {tuple(other.shape)}; its first dimension must be the observations, at least one"
            )
        if other.shape[0] != tensor.shape[0]:
            raise ValueError(
                f"{path} has {other.shape[0]} observations, {first} {tensor.shape[0]}; give all of them the same first "
                "dimension (recurrent states, too: transpose them)"
            )
    return int(tensor.shape[0])


def _digest(tensor: Tensor) -> int:
    """Of the bits, each weighed by its place, modulo 2**64."""
    bits = as_bits(tensor.contiguous()).reshape(-1).to(torch.int64)
    places = torch.arange(1, len(bits) + 1, device=bits.device) * 0x9E3779B97F4A7C1
    return int(((bits + 1) * (places | 1)).sum())
