"""What the function of a `PolicyKL` returned, checked: logits, or a distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from step_optim.audit.distributions import Kept, Leaf, find_leaf
from step_optim.audit.rows import Rows


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
    def of(cls, out: Any) -> Output:
        """Read what the function returned.

        Raises:
            TypeError: it is neither logits nor a distribution whose KL has a closed form.
            ValueError: its shape does not tell the observations.
        """
        if isinstance(out, Tensor):
            return cls("logits", (_checked_logits(out).shape[0],), None, out)
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
        """Equal for outputs that can be compared."""
        choices = None if self.logits is None else self.logits.shape[-1]
        return self.name, self.batch_shape, self.parts_shape, choices

    @property
    def parts(self) -> int:
        """KLs of one observation."""
        return math.prod(self.parts_shape[1:])

    @property
    def beside(self) -> int:
        """Elements of the batch shape of one observation."""
        return math.prod(self.batch_shape[1:])

    def keep(self) -> Rows | Kept:
        """Copy it: training reaches none of the copies. A categorical policy becomes rows [N ..., A]."""
        if self.logits is not None:
            return Rows(self.logits.detach().clone().reshape(-1, self.logits.shape[-1]))
        assert self.leaf is not None
        return self.leaf.keep()

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


def _checked_logits(out: Tensor) -> Tensor:
    if out.dim() == 2 and 0 not in out.shape and out.is_floating_point():
        return out
    if out.dim() == 2 and 0 not in out.shape:
        raise TypeError(f"fn returned a tensor of {out.dtype}; give logits, which are floating-point numbers")
    raise ValueError(
        f"fn returned logits of shape {tuple(out.shape)}; give [observations, actions]. For several factors of one "
        "action, whose KLs add up, return Independent(Categorical(logits=z), 1); for texts of several tokens "
        "Categorical(logits=z) with PolicyKL(..., reduction='mean')"
    )
