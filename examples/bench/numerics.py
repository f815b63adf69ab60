"""Section "numerics": how far the measured KL is from float64, from 1e-10 to 1, next to the textbook sum."""

from __future__ import annotations

import math

import torch
from naive import Padded
from torch import Tensor
from workload import Workload

from step_optim.audit.divergence import row_kl
from step_optim.audit.rows import Head, Rows

SIZES = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1.0)
"""KLs in nats, hit to about a percent."""

ROWS = 128
"""Response rows; float64 over the whole vocabulary takes its time."""

AT_ONCE = 32


def measure_numerics(workload: Workload) -> list[dict[str, float]]:
    """Relative errors of the mean KL in float32, from the model's own hidden states."""
    previous = _rows(workload)
    direction = torch.randn(previous.x.shape, generator=torch.Generator().manual_seed(0)).to(previous.x.device)
    assert row_kl(previous, previous).count_nonzero() == 0
    return [_errors(previous, direction, size) for size in (0.0, *SIZES)]


@torch.no_grad()
def _rows(workload: Workload) -> Rows:
    """Hidden states of response rows, [R, D] float32, and the head."""
    model = workload.model("full").eval()
    batch = Padded.of(workload.control())
    out = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, output_hidden_states=True)
    hidden: Tensor = out.hidden_states[-1][batch.predicts][:ROWS]
    return Rows(hidden.float(), Head(model.get_output_embeddings().weight.detach().float()))


def _errors(previous: Rows, direction: Tensor, size: float) -> dict[str, float]:
    """At one size of movement. Zero movement has no relative error: there the reading itself counts."""
    step = _step_of(previous, direction, size)
    candidate = Rows(previous.x + step * direction, previous.head)
    truth = float(_textbook(previous, candidate, torch.float64).mean())
    read = {
        "step_optim": float(row_kl(previous, candidate).mean()),
        "textbook": float(_textbook(previous, candidate, torch.float32).double().mean()),
    }
    return {"kl": truth} | {name: abs(kl / truth - 1) if size > 0 else abs(kl) for name, kl in read.items()}


def _step_of(previous: Rows, direction: Tensor, size: float) -> float:
    """How far to go for a KL of this size, which grows like the square."""
    step = math.sqrt(size)
    for _ in range(6 if size > 0 else 0):
        found = float(row_kl(previous, Rows(previous.x + step * direction, previous.head)).mean())
        step *= math.sqrt(size / found)
    return step


def _textbook(previous: Rows, candidate: Rows, dtype: torch.dtype) -> Tensor:
    """Sum over v of p_c (log p_c - log p_p), a few rows at a time."""
    assert previous.head is not None
    weight, found = previous.head.weight.to(dtype), []
    for x_p, x_c in zip(previous.x.split(AT_ONCE), candidate.x.split(AT_ONCE), strict=True):
        log_p, log_c = ((x.to(dtype) @ weight.T).log_softmax(-1) for x in (x_p, x_c))
        found.append((log_c.exp() * (log_c - log_p)).sum(-1))
    return torch.cat(found)
