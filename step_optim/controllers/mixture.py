"""The mixture of previous and candidate that `Project` aims at: how strong it may be on each prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step_optim.audit.closure import Audit
from step_optim.audit.logit_kl import LogitKL
from step_optim.limits import Limits
from step_optim.precision import upper_bound

TARGET_ROUNDS = 24
"""Corrections of lambda at most; where KL is nearly proportional to lambda², 2 or 3 are enough."""

PARABOLA_ROUNDS = 4
"""Corrections that assume so; bisection makes the others."""

TARGET_TOLERANCE = 0.02
"""Relative distance of a target's KL from its budget at which lambda is good enough: the audit has the last word."""


def mixture_strength(kl: LogitKL, candidate: Audit, limits: Limits) -> Tensor:
    """The largest lambda of each prompt, [C], at which the mixture is within all budgets.

    Every slice has the lambda that its own budget allows, every prompt that of
    the worst prompt and token, and a prompt the smallest of those that it is
    in. Where the global mean, a span of tokens, or the drift of all prompts or
    of a slice, is still too large, a common bound brings lambda down.
    """
    strength = torch.ones(kl.prompts, device="cpu")
    for of in ("", "token"):
        groups = [group for group in _own(kl, limits) if group.of == of]
        for group, value in zip(groups, _largest_strengths(kl, candidate, groups, limits), strict=True):
            strength[group.prompts] = strength[group.prompts].clamp_max(value)
    for group in _common(kl, limits):
        _bring_down(strength, group, limits, candidate, kl.prompt_kl)
    for group in _caps(kl, limits):  # drift begins at what theta_t has: no parabola
        _bring_down(strength, group, limits, candidate, kl.prompt_drift, parabola=False)
    return strength


@dataclass(frozen=True)
class _Group:
    """Prompts under one limit."""

    prompts: Tensor
    """[P] indices."""
    limit: float
    of: str = ""
    """What of their tokens: "" all of them, "token" the worst, or those in the span of this name."""
    is_mean: bool = True
    """Whether a mean over prompts is limited, which may have a confidence bound."""

    def figure(self, kls: Tensor, limits: Limits) -> float:
        """What is held against the limit."""
        if self.is_mean and limits.confidence is not None:
            return upper_bound(kls.tolist(), limits.confidence)
        return float(kls.mean())


def _own(kl: LogitKL, limits: Limits) -> Iterator[_Group]:
    """Yield what has a lambda of its own: slices, and single prompts under limits on tails."""
    for name, limit in limits.slices.items():
        if name not in kl.spans:
            yield _Group(torch.tensor(kl.members[name], device="cpu"), limit)
    for of, limit in (("", limits.prompt), ("token", limits.token)):
        for prompt in range(kl.prompts if limit < math.inf else 0):
            yield _Group(torch.tensor([prompt], device="cpu"), limit, of, is_mean=False)


def _common(kl: LogitKL, limits: Limits) -> Iterator[_Group]:
    """Yield what one bound serves all prompts for: spans, and the mean."""
    for name, limit in limits.slices.items():
        if name in kl.spans and limit < math.inf:
            yield _Group(torch.tensor(kl.spans[name].prompts, device="cpu"), limit, name)
    if limits.mean < math.inf:
        yield _Group(torch.arange(kl.prompts, device="cpu"), limits.mean)


def _caps(kl: LogitKL, limits: Limits) -> Iterator[_Group]:
    """Yield the finite caps on drift."""
    for name, limit in limits.drift_slices.items():
        if limit < math.inf:
            span = name if name in kl.spans else ""
            members = kl.spans[name].prompts if span else kl.members[name]
            yield _Group(torch.tensor(members, device="cpu"), limit, span)
    if limits.drift < math.inf:
        yield _Group(torch.arange(kl.prompts, device="cpu"), limits.drift)


def _bring_down(
    strength: Tensor,
    group: _Group,
    limits: Limits,
    candidate: Audit,
    measure: Callable[[Audit, Tensor, Tensor, str], Tensor],
    *,
    parabola: bool = True,
) -> None:
    """Bound the strengths of some prompts by one number, so that their figure is within its limit."""
    bound = _Root(parabola=parabola)
    for _ in range(TARGET_ROUNDS):
        kls = measure(candidate, strength[group.prompts].clamp_max(bound.value), group.prompts, group.of)
        if not bound.refine(group.figure(kls, limits), group.limit):
            break
    strength[group.prompts] = strength[group.prompts].clamp_max(bound.value)


def _largest_strengths(kl: LogitKL, candidate: Audit, groups: Sequence[_Group], limits: Limits) -> list[float]:
    """The lambda of each group by itself; one pass over the rows of all of them for every round."""
    roots = [_Root() for _ in groups]
    for _ in range(TARGET_ROUNDS if groups else 0):
        strength = torch.cat(
            [
                torch.full((len(group.prompts),), root.value, device="cpu")
                for group, root in zip(groups, roots, strict=True)
            ]
        )
        moved = kl.prompt_kl(candidate, strength, torch.cat([group.prompts for group in groups]), groups[0].of)
        parts = torch.split(moved, [len(group.prompts) for group in groups])
        again = [
            root.refine(group.figure(part, limits), group.limit)
            for root, part, group in zip(roots, parts, groups, strict=True)
        ]
        if not any(again):
            break
    return [root.value for root in roots]


class _Root:
    """The largest lambda in [0, 1] with K(lambda) <= limit; K grows with lambda, nearly like lambda²."""

    def __init__(self, *, parabola: bool = True) -> None:
        self.value = 1.0
        self._low, self._high = 0.0, 1.0
        self._rounds = 0 if parabola else PARABOLA_ROUNDS

    def refine(self, kl: float, limit: float) -> bool:
        """Use one measurement, taken at `value`; whether another one, at the new `value`, would help."""
        ratio = kl / limit if limit > 0 else (0.0 if kl == 0 else math.inf)
        if abs(ratio - 1) <= TARGET_TOLERANCE or (ratio <= 1 and self.value == 1.0):
            return False
        if ratio > 1:
            self._high = self.value
        else:
            self._low = self.value
        self._rounds += 1
        aim = self.value / math.sqrt(ratio) if 0 < ratio < math.inf else math.nan
        # Certain policies are no parabola: K is nearly exponential there.
        trusted = self._rounds <= PARABOLA_ROUNDS and self._low < aim < self._high
        self.value = aim if trusted else 0.5 * (self._low + self._high)
        return self._high - self._low > 1e-6
