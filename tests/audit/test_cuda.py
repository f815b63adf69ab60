"""TokenKL on a CUDA device: the same figures as on a CPU, and what only happens there."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from step_optim import Budget, Interpolate, STEPOptimizer, TokenKL
from step_optim.audit.divergence import row_kl
from step_optim.audit.rows import Head, Rows
from tests.audit.test_divergence import float64_kl
from tests.audit.test_prefix import chat_control
from tests.models import nudge, tiny_gpt2, tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_float32_figures_are_those_of_a_cpu(build, prefix) -> None:
    """Movement and drift agree to 1e-4, zero is exactly 0, and one batch takes the whole control set."""
    figures = []
    for device in ("cpu", "cuda"):
        model = build(hidden=32, layers=2).to(device)
        kl = TokenKL(model, chat_control().to(device), prefix=prefix)
        assert (kl.prefix_tokens > 0) == prefix
        kl.anchor()
        assert kl().mean == 0.0
        cpu = copy.deepcopy(model).cpu()
        nudge(cpu, 0.05)
        model.load_state_dict(cpu.state_dict())
        audit = kl.audit_with_drift()
        figures.append((audit.movement, audit.drift, len(kl._layout.batches)))
    (a, drift_a, _), (b, drift_b, batches) = figures
    assert batches == 1
    assert a.mean == pytest.approx(b.mean, rel=1e-4)
    assert drift_a.mean == pytest.approx(drift_b.mean, rel=1e-4)
    assert dict(a.slices) == pytest.approx(dict(b.slices), rel=1e-4)


@pytest.mark.parametrize("size", [0.0, 1e-2, 0.3])
def test_products_of_16_bit_numbers_are_exact(size) -> None:
    """bf16 hidden states and a bf16 head give the figure of float64 on the same numbers: 1e-3 at K of 1e-4 and more."""
    g = torch.Generator().manual_seed(0)
    head = Head(torch.randn(40_000, 256, generator=g).to(torch.bfloat16).cuda())
    x = torch.randn(64, 256, generator=g) / 4
    previous, candidate = (
        Rows((x + s * torch.randn(64, 256, generator=g) / 4).to(torch.bfloat16).cuda(), head) for s in (0.0, size)
    )
    expected = float(float64_kl(candidate.logits64(), previous.logits64()).mean())
    assert float(row_kl(previous, candidate).mean()) == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_float32_numerics() -> None:
    """1e-5 from K = 1e-10 to 1 on the device as well."""
    g = torch.Generator().manual_seed(0)
    head = Head((torch.randn(30_000, 128, generator=g) / 128**0.5).cuda())
    x, step = torch.randn(48, 128, generator=g).cuda(), torch.randn(48, 128, generator=g).cuda()
    for kl in (1e-10, 1e-6, 1e-2, 1.0):
        previous, candidate = Rows(x, head), Rows(x + math.sqrt(2 * kl) * step, head)
        expected = float(float64_kl(candidate.logits64(), previous.logits64()).mean())
        assert float(row_kl(previous, candidate).mean()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("snapshot", ["device", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_holds_its_budget(dtype, snapshot) -> None:
    """Triggered steps are within the budget, in both precisions and with both snapshots."""
    model = tiny_llama(hidden=64, layers=2, dtype=dtype).cuda()
    optimizer = STEPOptimizer(
        torch.optim.AdamW(model.parameters(), lr=3e-2),
        TokenKL(model, chat_control().to("cuda")),
        budget=Budget(mean=0.05),
        controller=Interpolate(),
        snapshot=snapshot,
    )
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g).to(p)
        optimizer.step()
        assert optimizer.last.triggered
        assert optimizer.last.accepted.mean <= 0.05
