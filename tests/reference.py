"""Slow, obvious oracles, written from section 3 of the paper: loops, full softmax, python floats, float64 models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from step_optim import ControlSet, Movement

Row = list[float]
"""Logits of one response position over the whole vocabulary."""

Policy = list[list[Row]]
"""Logits of every response position of every prompt: [prompt][token][vocabulary]."""


def log_softmax(row: Row) -> Row:
    """Log-probabilities of one position."""
    peak = max(row)
    total = math.fsum(math.exp(z - peak) for z in row)
    return [z - peak - math.log(total) for z in row]


def row_kl(candidate: Row, previous: Row) -> float:
    """D_KL(pi_candidate ‖ pi_previous) at one position: sum over v of p_c (log p_c - log p_p)."""
    terms = []
    for log_c, log_p in zip(log_softmax(candidate), log_softmax(previous), strict=True):
        if log_c == -math.inf:
            continue  # 0 log 0 = 0
        if log_p == -math.inf:
            return math.inf
        terms.append(math.exp(log_c) * (log_c - log_p))
    return math.fsum(terms)


def rounding(kl: float) -> float:
    """How far from this K [nats per token] a float32 evaluation of logits of size 1 may be.

    K is half of the mean square of the log-ratios. If those are off by d, K is off by d sqrt(2 K) + d² / 2 at most; a
    log-ratio is the difference of two logits, and d at most an eps for each of them.
    """
    off = 2 * torch.finfo(torch.float32).eps
    return off * math.sqrt(2 * kl) + off**2 / 2


def near(kl: float, rel: float) -> Any:
    """Equal to figures that are off by ``rel`` of this K and by its rounding, or less."""
    return pytest.approx(kl, rel=0, abs=rel * kl + rounding(kl))


def prompt_kl(candidate: Sequence[Row], previous: Sequence[Row]) -> float:
    """1/T_x times the sum over the response tokens of one prompt."""
    total = 0.0
    for row_c, row_p in zip(candidate, previous, strict=True):
        total += row_kl(row_c, row_p)
    return total / len(candidate)


def movement(candidate: Policy, previous: Policy, slices: Mapping[str, Sequence[int]]) -> Movement:
    """K_global and K_s, the two equations of section 3.2."""
    every = range(len(candidate))

    def mean_over(prompts: Sequence[int]) -> float:
        total = 0.0
        for x in prompts:
            total += prompt_kl(candidate[x], previous[x])
        return total / len(prompts)

    means = {name: mean_over(members) for name, members in slices.items()}
    prompt = max(prompt_kl(candidate[x], previous[x]) for x in every)
    token = max(row_kl(c, p) for x in every for c, p in zip(candidate[x], previous[x], strict=True))
    return Movement(mean_over(every), means, prompt, token)


def token_weighted(candidate: Policy, previous: Policy) -> float:
    """What K_global must *not* be: the mean over all response tokens, in which long responses count for more."""
    every = [
        row_kl(row_c, row_p)
        for c, p in zip(candidate, previous, strict=True)
        for row_c, row_p in zip(c, p, strict=True)
    ]
    return sum(every) / len(every)


def mixture(candidate: Policy, previous: Policy, strength: Sequence[float]) -> Policy:
    """Logits (1 - lambda_x) l_previous + lambda_x l_candidate."""
    return [
        [
            [(1 - lam) * p + lam * c for c, p in zip(row_c, row_p, strict=True)]
            for row_c, row_p in zip(cs, ps, strict=True)
        ]
        for cs, ps, lam in zip(candidate, previous, strength, strict=True)
    ]


def projection_objective(policy: Policy, candidate: Policy) -> float:
    """1/|C| times the sum over prompts of ‖l_theta(x) - l_candidate(x)‖², per response token of the prompt."""
    total = 0.0
    for rows, wanted in zip(policy, candidate, strict=True):
        squares = 0.0
        for row, row_wanted in zip(rows, wanted, strict=True):
            squares += math.fsum((z - w) ** 2 for z, w in zip(row, row_wanted, strict=True))
        total += squares / len(rows)
    return total / len(candidate)


def policy_of(model: nn.Module, control: ControlSet) -> Policy:
    """Evaluate a float64 eval-mode copy of a causal model: one prompt at a time, no padding, the whole head."""
    twin = copy.deepcopy(model).double().eval()
    policy = []
    with torch.no_grad():
        for prompt, response in zip(control.prompts, control.responses, strict=True):
            out = twin(torch.cat([prompt, response])[None])
            logits: Any = out if isinstance(out, Tensor) else out.logits
            rows = []
            for tau in range(len(response)):
                rows.append(logits[0, len(prompt) - 1 + tau].tolist())
            policy.append(rows)
    return policy


def policy_from_rows(logits: Tensor, lengths: Sequence[int]) -> Policy:
    """Cut logits [R, V] into prompts of the given response lengths."""
    rows = logits.double().tolist()
    policy, start = [], 0
    for length in lengths:
        policy.append(rows[start : start + length])
        start += length
    return policy


def within(moved: Movement, mean: float = math.inf, slices: Mapping[str, float] | None = None) -> bool:
    """The trust region of section 3.2: K_global <= eps_g and K_s <= eps_s for every slice with a budget."""
    return moved.mean <= mean and all(moved.slices[name] <= limit for name, limit in (slices or {}).items())


def largest_alpha(feasible: Callable[[float], bool], points: int = 2000, smallest: float = 1e-9) -> float:
    """alpha*: the largest feasible alpha of a dense grid (linear and logarithmic), refined inside its cell; 0 if none.

    Exact where feasibility is monotone in alpha.
    """
    grid = {k / points for k in range(1, points + 1)}
    grid |= {smallest ** (k / points) for k in range(points + 1)}
    ordered = sorted(grid)
    best, above = 0.0, ordered[0]
    for alpha in reversed(ordered):
        if feasible(alpha):
            best = alpha
            break
        above = alpha
    else:
        return 0.0
    if best == 1.0:
        return 1.0
    for _ in range(60):
        middle = 0.5 * (best + above)
        best, above = (middle, above) if feasible(middle) else (best, middle)
    return best
