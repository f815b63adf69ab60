"""The movement statistic as pure functions: rows of policy -> KL per row and prompt.

Shapes: R response rows (one per response token), V vocabulary, C prompts, J
references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from step_optim.audit.rows import Head, Reader, Rows, Scratch, vocab_blocks

__all__ = ["Head", "Rows", "Streamed", "prompt_means", "row_kl", "stream_kl"]

LARGEST_LOG_RATIO = 40.0
"""|log-ratio| from which a row is read again in float64: float32's exp ends at 88, and forgets tokens below e^-87."""

SERIES = 0.125
"""|log-ratio| up to which expm1(u) - u is summed as a series, for it would cancel; the next term is 1e-7 of the sum."""

ROWS_AGAIN = 32
"""Rows of the float64 re-reading that are held at once."""


@dataclass(frozen=True)
class Streamed:
    """What one pass over the vocabulary found. Nothing has waited for an accelerator yet."""

    kl: Tensor
    """[J, R] float64 nats."""
    doubtful: Tensor
    """[J, R] rows that float32 cannot tell, which `settle` reads again."""
    centre: Tensor
    """[J, R] float64, E_c[v]."""
    log_mass: Tensor
    """[R] float64, the log-sum-exp of the candidate's logits."""


@torch.no_grad()
def row_kl(previous: Rows, candidate: Rows, strength: Tensor | None = None) -> Tensor:
    """KL(candidate ‖ previous) of each row over the full vocabulary, [R] float64 nats; the equation is `stream_kl`'s.

    Args:
        previous: the policy before the step, R rows.
        candidate: the policy that is measured, the same R rows.
        strength: [R] lambda, to measure the geometric mixture
            (1 - lambda) l_previous + lambda l_candidate instead of the candidate.
    """
    return settle(stream_kl([previous], candidate, strength), [previous], candidate, strength)[0]


@torch.no_grad()
def stream_kl(
    references: Sequence[Rows], candidate: Rows, strength: Tensor | None = None, scratch: Scratch | None = None
) -> Streamed:
    """KL(candidate ‖ reference) of each row for J references, in one pass over blocks of the vocabulary.

    With v = reference logits - candidate logits, c the candidate's
    distribution and u = v - E_c[v]:

        KL = log E_c[e^v] - E_c[v] = log1p(B),   B = E_c[expm1(u) - u]

    The textbook sum p_c (log p_c - log p_p) subtracts two log-sum-exps whose
    rounding enters at first order: in float32 it is off by a factor of 19 at
    KL = 1e-10. This form is exactly 0 at zero movement. Blocks are centred on
    their own mean, and merged in float64.
    """
    scratch = Scratch() if scratch is None else scratch
    reader = Reader(candidate, references, scratch)
    sums = []
    for start, stop in vocab_blocks(candidate):
        z, differences = reader.read(start, stop)
        if strength is not None:
            z, differences = _mixed(z, differences, strength)
        sums.append(_block_sums(z, differences, scratch, coarse=reader.exact))
    peak, mass, centre, growth, largest = (torch.stack(part) for part in zip(*sums, strict=True))
    top = peak.amax(0)
    weight = mass * torch.exp(peak - top)  # [blocks, R]
    total = weight.sum(0)
    weight = (weight / total)[:, None]  # [blocks, 1, R]; the others are [blocks, J, R]
    mean = (weight * centre).sum(0)
    shift = centre - mean
    kl = torch.log1p((weight * (torch.exp(shift) * growth + (torch.expm1(shift) - shift))).sum(0))
    farthest = torch.maximum(largest, shift.abs()).amax(0)
    return Streamed(kl.clamp_min(0), ~(kl.isfinite() & (farthest < LARGEST_LOG_RATIO)), mean, top + total.log())


def _mixed(z: Tensor, differences: list[Tensor], strength: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The mixture in the candidate's place: z + (1 - lambda) v, and lambda v."""
    weight = strength[:, None].to(z.dtype)
    (v,) = differences
    return z + _weakened(v, 1 - weight), [_weakened(v, weight)]


def _weakened(v: Tensor, weight: Tensor) -> Tensor:
    """V * weight; 0 * inf, a token that only one of the two masks, is no difference at weight 0."""
    return torch.where(weight == 0, 0.0, v * weight)


def _block_sums(z: Tensor, differences: list[Tensor], scratch: Scratch, *, coarse: bool) -> tuple[Tensor, ...]:
    """Sums of one vocabulary block, float64: its largest logit and mass [R]; of each reference, see below, [J, R].

    Writes over what it is given. ``coarse``: the logits' difference is not
    known well enough for `SERIES` to matter, for it comes from 16-bit numbers.
    """
    peak = z.amax(1, keepdim=True)
    c = z.sub_(peak).exp_()
    mass = c.sum(1)
    each = [_reference_sums(c, mass, v, scratch, coarse=coarse) for v in differences]
    return peak[:, 0].double(), mass.double(), *(torch.stack(part) for part in zip(*each, strict=True))


def _reference_sums(
    c: Tensor, mass: Tensor, v: Tensor, scratch: Scratch, *, coarse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The centre E[v] of one block, E[expm1(u) - u] around it, and the largest |u|; [R] float64 each."""
    product = scratch.like("product", c)
    mean = torch.mul(c, v, out=product).sum(1) / mass
    u = v.sub_(mean[:, None])
    largest = torch.maximum(u.amax(1), -u.amin(1))
    rest = torch.mul(c, u, out=product).sum(1).double() / mass  # of the mean, which was rounded
    straight = coarse or u.dtype == torch.float64
    growth = (
        torch.expm1(u, out=product).sub_(u).mul_(c).sum(1) if straight else _growth(c, u, largest, product, scratch)
    )
    growth = growth.double() / mass
    # E[e^u'] for u' = u - rest, from that for u.
    growth = torch.expm1(-rest) + torch.exp(-rest) * (rest + growth)
    return mean.double() + rest, growth, largest.double()


def _growth(c: Tensor, u: Tensor, largest: Tensor, product: Tensor, scratch: Scratch) -> Tensor:
    """Sum of c (expm1(u) - u), [R]: as it stands where u is large, as a series where it would cancel."""
    large = torch.ops.aten.hardshrink.out(u, SERIES, out=scratch.like("large", u))  # u where |u| > SERIES, else 0
    small = u.sub_(large)
    series = torch.mul(small, 1 / 720, out=product)
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2):
        series.add_(coefficient).mul_(small)
    growth = series.mul_(small).mul_(c).sum(1)
    if u.device.type != "cpu" or not bool((largest <= SERIES).all()):  # a CPU can look without waiting
        growth += torch.expm1(large, out=product).sub_(large).mul_(c).sum(1)
    return growth


@torch.no_grad()
def settle(streamed: Streamed, references: Sequence[Rows], candidate: Rows, strength: Tensor | None = None) -> Tensor:
    """[J, R] KL, the doubtful rows read again in float64."""
    kl = streamed.kl.clone()
    for j, reference in enumerate(references):
        for rows in streamed.doubtful[j].nonzero().flatten().split(ROWS_AGAIN):  # type: ignore[no-untyped-call]
            part = None if strength is None else strength[rows, None].double()
            kl[j, rows] = _textbook_kl(reference[rows].logits64(), candidate[rows].logits64(), part)
    return kl


def _textbook_kl(z_p: Tensor, z_c: Tensor, strength: Tensor | None) -> Tensor:
    """The paper's sum over float64 logits [R, V], max-shifted; a token that the candidate never says adds nothing."""
    if strength is not None:
        z_c = z_p + torch.where(z_c == z_p, 0.0, _weakened(z_c - z_p, strength))
    log_p, log_c = z_p.log_softmax(-1), z_c.log_softmax(-1)
    terms = log_c.exp() * (log_c - log_p)
    return torch.where(log_c == -torch.inf, 0.0, terms).sum(-1).clamp_min(0)


def prompt_means(rows: Tensor, prompt_of_row: Tensor, prompts: int) -> Tensor:
    """Mean over each prompt's own rows: [..., R] -> [..., C] float64 (the inner 1/T_x sum of the paper)."""
    sums = torch.zeros(*rows.shape[:-1], prompts, dtype=torch.float64, device=rows.device)
    counts = torch.zeros(prompts, dtype=torch.float64, device=rows.device)
    counts.index_add_(0, prompt_of_row, torch.ones_like(prompt_of_row, dtype=torch.float64))  # bincount would wait
    return sums.index_add_(-1, prompt_of_row, rows.double()) / counts
