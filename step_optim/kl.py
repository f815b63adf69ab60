"""The movement statistic as pure functions: rows of policy -> KL per row, prompt and slice.

Shapes: R response rows (one per response token), V vocabulary, C prompts, D
features of a row (hidden width, or V).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

VOCAB_BLOCK = 2048
"""Vocabulary columns read at once. 512 to 2048 cost the same; one block of all V would hold both policies."""

LARGEST_LOG_RATIO = 80.0
"""|log-ratio| above which a row is read again in float64: float32's exp overflows at 88."""

SMALL_LOG_RATIO = 0.05
"""|log-ratio| below which expm1(u) - u is summed as a series: the next term is u**6 / 720, 3e-10 of the first."""

ROWS_AGAIN = 32
"""Rows of the float64 re-reading that are held at once."""


@dataclass(frozen=True)
class Head:
    """A linear output head: logits = x @ weight.T + bias."""

    weight: Tensor
    """[V, D]"""

    bias: Tensor | None = None
    """[V], or None."""

    def copy(self) -> Head:
        """Return a copy that later updates of the head do not reach."""
        return Head(self.weight.detach().clone(), None if self.bias is None else self.bias.detach().clone())

    def columns(self, start: int, stop: int) -> Head:
        """Return the head of vocabulary columns start..stop, in float32 (float64 stays)."""
        bias = None if self.bias is None else _at_least_float32(self.bias[start:stop])
        return Head(_at_least_float32(self.weight[start:stop]), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[R, D] -> logits [R, columns]."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Rows:
    """A policy on the control set: what it takes to know its distribution at every response row.

    With a head, ``x`` are the last hidden states (small); without one, the
    logits themselves. Two `Rows` with the *same* head object differ in ``x``
    alone, which makes their logits difference exact to the last bits.
    """

    x: Tensor
    """[R, D] hidden states, or [R, V] logits."""

    head: Head | None = None

    @property
    def vocab(self) -> int:
        """V."""
        return self.x.shape[-1] if self.head is None else self.head.weight.shape[0]

    def logits(self) -> Tensor:
        """[R, V]; for a few rows at a time."""
        return _at_least_float32(self.x) if self.head is None else self._read(0, self.vocab)

    def __getitem__(self, rows: Tensor | slice) -> Rows:
        """Return some of the rows."""
        return replace(self, x=self.x[rows])

    def _read(self, start: int, stop: int) -> Tensor:
        if self.head is None:
            return _at_least_float32(self.x[:, start:stop])
        columns = self.head.columns(start, stop)
        return columns(self.x.to(columns.weight.dtype))


def blocks(previous: Rows, candidate: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Stream (previous logits, candidate - previous logits) over vocabulary blocks.

    The difference is formed before the head wherever that is possible,
    (x_c - x_p) W^T rather than x_c W^T - x_p W^T, because the rounding of two
    large logits would otherwise drown a small movement.
    """
    for start in range(0, previous.vocab, VOCAB_BLOCK):
        stop = min(start + VOCAB_BLOCK, previous.vocab)
        z = previous._read(start, stop)
        if previous.head is None or candidate.head is None:
            there = candidate._read(start, stop)
            yield z, torch.where(there == z, 0.0, there - z)  # equal infinities, masked actions, do not differ
            continue
        old = previous.head.columns(start, stop)
        x_p, x_c = previous.x.to(old.weight.dtype), candidate.x.to(old.weight.dtype)
        delta = (x_c - x_p) @ old.weight.T
        if candidate.head is not previous.head:
            new = candidate.head.columns(start, stop)
            delta += x_c @ (new.weight - old.weight).T
            if old.bias is not None and new.bias is not None:
                delta += new.bias - old.bias
        yield z, delta


def row_kl(previous: Rows, candidate: Rows, strength: Tensor | None = None) -> Tensor:
    """KL(candidate ‖ previous) of each row over the full vocabulary, [R] float64 nats.

    With d = candidate logits - previous logits, p the previous distribution
    and u = d - E_p[d]:

        KL = A / (1 + B) - log1p(B),   A = E_p[u expm1(u)],   B = E_p[expm1(u) - u]

    The textbook sum p_c (log p_c - log p_p) subtracts two log-sum-exps whose
    rounding enters at first order: in float32 it is off by a factor of 19 at
    KL = 1e-10. This form is exactly 0 at zero movement. Blocks are centred on
    their own mean and merged in float64. Rows with a log-ratio beyond
    `LARGEST_LOG_RATIO`, masked (-inf) or NaN logits are read again in float64.

    Args:
        previous: the policy before the step, R rows.
        candidate: the policy that is measured, the same R rows.
        strength: [R] lambda, to measure the geometric mixture
            (1 - lambda) l_previous + lambda l_candidate instead of the candidate.
    """
    sums = [_block_sums(z, _weakened(d, strength)) for z, d in blocks(previous, candidate)]
    peak, mass, centre, largest, a, b = (torch.stack(part) for part in zip(*sums, strict=True))
    weight = mass * torch.exp(peak - peak.amax(0))
    weight = weight / weight.sum(0)
    shift = centre - (weight * centre).sum(0)
    grown = torch.exp(shift)
    # E_p[e^u - 1] and E_p[u e^u] around the common centre, from each block's own centre.
    total_b = (weight * (grown * b + (torch.expm1(shift) - shift))).sum(0)
    total_a = (weight * (grown * (a + shift * b) + shift * torch.expm1(shift))).sum(0)
    kl = total_a / (1 + total_b) - torch.log1p(total_b)
    again = ~(kl.isfinite() & (largest.amax(0) < LARGEST_LOG_RATIO) & (shift.abs().amax(0) < LARGEST_LOG_RATIO))
    for rows in again.nonzero().flatten().split(ROWS_AGAIN):  # type: ignore[no-untyped-call]
        kl[rows] = _row_kl_float64(previous[rows], candidate[rows], None if strength is None else strength[rows])
    return kl.clamp_min(0)


def _weakened(d: Tensor, strength: Tensor | None) -> Tensor:
    """D * lambda; 0 * inf, a token that only the candidate masks, is no difference at lambda = 0."""
    if strength is None:
        return d
    weight = strength[:, None].to(d.dtype)
    return torch.where(weight == 0, 0.0, d * weight)


def _block_sums(z: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Sums of one vocabulary block, [R] float64: max logit, mass, centre, largest |u|, A and B."""
    peak = z.amax(1, keepdim=True)
    p = (z - peak).exp_()
    mass = p.sum(1).double()
    centre = (_dot(p, d) / mass).to(d.dtype)
    u = d - centre[:, None]
    # The centre was rounded to d's precision: what is left of the mean is taken out of A and B exactly.
    rest = _dot(p, u) / mass
    growth = torch.expm1(u)
    largest = u.abs().amax(1).double()
    if float(largest.max()) < SMALL_LOG_RATIO:  # expm1(u) - u would cancel
        b = _dot(p, u * u * (0.5 + u * (1 / 6 + u * (1 / 24 + u / 120)))) / mass
    else:
        b = _dot(p, growth - u) / mass
    a = _dot(p, u.mul_(growth)) / mass
    return peak[:, 0].double(), mass, centre.double() + rest, largest, *_recentre(a, b, rest)


def _dot(p: Tensor, x: Tensor) -> Tensor:
    """Row by row, [R] float64."""
    return torch.sum(p * x, dim=1).double()


def _recentre(a: Tensor, b: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Move A = E[u expm1(u)] and B = E[expm1(u) - u] to u' = u - rest, where rest = E[u] is tiny."""
    shrunk = torch.exp(-rest)
    # E[e^u'] = e^-r (1 + r + B);  E[u' e^u'] = e^-r (A + r - r (1 + r + B))
    new_b = torch.expm1(-rest) + shrunk * (rest + b)
    new_a = shrunk * (a - rest * (rest + b))
    return new_a, new_b


def _row_kl_float64(previous: Rows, candidate: Rows, strength: Tensor | None) -> Tensor:
    """The textbook sum in float64, max-shifted; a token that the candidate never says adds nothing."""
    z_p, z_c = previous.logits().double(), candidate.logits().double()
    if strength is not None:
        z_c = z_p + torch.where(z_c == z_p, 0.0, _weakened(z_c - z_p, strength))
    log_p, log_c = z_p.log_softmax(-1), z_c.log_softmax(-1)
    terms = log_c.exp() * (log_c - log_p)
    return torch.where(log_c == -torch.inf, 0.0, terms).sum(-1)


def prompt_means(rows: Tensor, prompt_of_row: Tensor, prompts: int) -> Tensor:
    """Mean over each prompt's own rows: [R] -> [C] float64 (the inner 1/T_x sum of the paper)."""
    sums = torch.zeros(prompts, dtype=torch.float64, device=rows.device)
    sums.index_add_(0, prompt_of_row, rows.double())
    return sums / torch.bincount(prompt_of_row, minlength=prompts)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
