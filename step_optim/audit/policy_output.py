"""What the function of a `PolicyKL` returned, checked: logits, or a distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from step_optim.audit.closed_forms import log_probabilities
from step_optim.audit.distributions import Kept, Leaf, find_leaf
from step_optim.audit.rows import Rows
from step_optim.control.listing import shown


@dataclass(frozen=True)
class Output:
    """A policy on the N control observations, with the graph that it came with."""

    name: str
    """ "logits", or the class of the distribution."""

    batch_shape: tuple[int, ...]
    """Of the whole: [N, ...]. What `Independent` has taken in is no part of it."""

    leaf: Leaf | None
    """None for logits."""

    logits: Tensor | None
    """[N, ..., A] of a categorical policy; None of any other."""

    @classmethod
    def of(cls, out: Any, *, several: bool = False) -> Output:
        """Read what the function returned.

        Args:
            out: logits or a distribution.
            several: whether logits may be of several parts of each observation, [N, ..., A].

        Raises:
            TypeError: it is neither logits nor a distribution whose KL has a closed form.
            ValueError: its shape does not tell the observations.
        """
        if isinstance(out, Tensor):
            return cls("logits", tuple(_checked_logits(out, several=several).shape[:-1]), None, out)
        if not isinstance(out, Distribution):
            raise TypeError(
                f"fn returned {type(out).__name__}; give logits [N, A] or a torch.distributions.Distribution"
            )
        if not out.batch_shape or 0 in out.batch_shape:
            raise ValueError(
                f"fn returned a distribution of batch shape {tuple(out.batch_shape)}; its first dimension must be the "
                "control observations"
            )
        leaf = find_leaf(out)
        return cls(leaf.name, tuple(out.batch_shape), leaf, leaf.logits if leaf.is_categorical else None)

    @property
    def parts_shape(self) -> tuple[int, ...]:
        """Of what has a KL of its own: [N, ...], with the dimensions that `Independent` has taken in."""
        if self.logits is not None:
            return tuple(self.logits.shape[:-1])
        return () if self.leaf is None else tuple(self.leaf.distribution.batch_shape)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for outputs of the same observations that can be compared."""
        choices = None if self.logits is None else self.logits.shape[-1]
        return self.name, self.batch_shape[1:], self.parts_shape[1:], choices

    @property
    def parts(self) -> int:
        """KLs of one observation."""
        return math.prod(self.parts_shape[1:])

    @property
    def beside(self) -> int:
        """Elements of the batch shape of one observation."""
        return math.prod(self.batch_shape[1:])

    def rows(self, mask: Tensor | None) -> Tensor:
        """The logits of a categorical policy, [N ..., A], with their graph; those of the parts in a mask [N ...]."""
        assert self.logits is not None
        rows = self.logits.reshape(-1, self.logits.shape[-1])
        return rows if mask is None else rows[mask]

    def keep(self, mask: Tensor | None = None) -> Rows | Kept:
        """Copy it: training reaches none of the copies. A categorical policy becomes rows [N ..., A]."""
        if self.logits is not None:
            return Rows(self.rows(mask).detach().clone())
        assert self.leaf is not None
        return self.leaf.keep()

    def checked_mask(self, mask: Any, reduction: str | None) -> Tensor | None:
        """Read the argument ``mask=``: which tokens [N, T] count; flat, where the policy is.

        Raises:
            TypeError: no tensor of flags.
            ValueError: no mean over tokens of a categorical policy is taken; another shape; an observation of which no
                token counts.
        """
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask={shown(mask)} is no tensor of flags; give one for each token [N, T], mask.bool()")
        if reduction != "mean" or self.logits is None or self.parts != self.beside:
            raise ValueError(
                f"mask= says which tokens [N, T] a mean is over; it needs reduction='mean' (here {reduction!r}) and "
                f"logits [N, T, A] or a Categorical of them (here {self.name})"
            )
        if mask.shape != self.batch_shape:
            raise ValueError(
                f"mask has the shape {tuple(mask.shape)}, the policy {self.batch_shape}; give one flag a token"
            )
        empty = (~mask.reshape(len(mask), -1).any(1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"mask leaves observation {empty[0]} without a token that counts; leave it out")
        return mask.flatten().to(self.logits.device)

    def check_choices(self) -> None:
        """Refuse a policy that has one action only: whatever is trained, its KL is 0."""
        choices = self.leaf.choices if self.logits is None and self.leaf is not None else self.kind[-1]
        if choices == 1:
            what = "logits" if self.leaf is None else self.name
            raise ValueError(
                f"fn returned {what} of shape {(*self.parts_shape, 1)}: there is one action only, so its probability "
                "is 1 and every KL is 0. For a yes or no return Bernoulli(logits=z); for a value or a reward a "
                "distribution around it, Normal(value, 1.0) say"
            )

    @property
    def may_be_tokens(self) -> bool:
        """Whether the further batch dimensions may be tokens as well as factors: those of a Categorical [N, T]."""
        return self.logits is not None and self.beside > 1


def same_mask(saved: Tensor | None, own: Tensor | None) -> bool:
    """Whether two masks, or none, let the same tokens count."""
    if saved is None or own is None:
        return saved is own
    return torch.equal(saved.cpu(), own.cpu())


def _checked_logits(out: Tensor, *, several: bool) -> Tensor:
    fits = 0 not in out.shape and (out.dim() == 2 or (several and out.dim() > 2))
    if fits and out.is_floating_point():
        return out
    if fits:
        raise TypeError(f"fn returned a tensor of {out.dtype}; give logits, which are floating-point numbers")
    raise ValueError(
        f"fn returned logits of shape {tuple(out.shape)}; give [observations, actions]. For several factors of one "
        "action, whose KLs add up, return Independent(Categorical(logits=z), 1), or give PolicyKL(..., "
        "reduction='sum'); for texts of several tokens, [observations, tokens, actions], reduction='mean'"
    )


def with_rows(saved: Mapping[str, Tensor], output: Output) -> dict[str, Tensor]:
    """Tensors of a checkpoint; of older ones, that kept a categorical distribution as it was, rows are made."""
    found = dict(saved)
    if output.leaf is not None and output.leaf.is_categorical:
        ((name, given),) = output.leaf.odds.items()
        if name in found and found[name].shape == given.shape:
            logits = log_probabilities(found[name]) if name.endswith("probs") else found[name]
            found["x"] = logits.reshape(-1, given.shape[-1])
    return found
