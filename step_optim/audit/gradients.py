"""Gradients of the movement statistic in closed form: where a backward pass through the model begins.

Shapes: R response rows, D features of a row (hidden width, or the vocabulary's), J references.

With c the candidate's distribution, v = reference logits - candidate logits
and u = v - E_c[v], the derivative of KL(candidate ‖ reference) with respect to
the candidate's logits is

    dKL/dz = c (log c - log r - KL) = -c u

so that nothing cancels near zero movement, and it streams over blocks of the
vocabulary as the KL itself does: with a head W, dKL/dx is the sum of the
blocks' products with W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from step_optim.audit.divergence import Streamed
from step_optim.audit.rows import Reader, Rows, Scratch, at_least_float32, vocab_blocks


@torch.no_grad()
def feature_gradients(
    references: Sequence[Rows], candidate: Rows, streamed: Streamed, scratch: Scratch
) -> list[Tensor]:
    """dKL_j / dx of each row, for J references, [R, D] each: of hidden states, or of logits if there is no head.

    Args:
        references: J policies of the same R rows.
        candidate: the policy that is measured.
        streamed: what `stream_kl` found of these.
        scratch: memory for intermediate results.
    """
    head, reader = candidate.head, Reader(candidate, references, scratch)
    wide = candidate.x if head is None else candidate.x.to(at_least_float32(head.weight[:0]).dtype)
    found = [torch.zeros_like(at_least_float32(wide)) for _ in references]
    for start, stop in vocab_blocks(candidate):
        z, differences = reader.read(start, stop)
        c = z.sub_(streamed.log_mass[:, None].to(z.dtype)).exp_()
        for x, v, centre in zip(found, differences, streamed.centre, strict=True):
            logits = v.sub_(centre[:, None].to(v.dtype)).mul_(c).neg_()
            if head is None:
                x[:, start:stop] = logits
            else:
                x.addmm_(logits, head.columns(start, stop).weight)
    return found
