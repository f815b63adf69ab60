"""What a reading may not depend on, and what it leaves to a closure of one's own."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import Tensor, nn

from step_optim import Budget, ControlSet, STEPOptimizer, TokenKL
from step_optim.audit.closure import Audit
from step_optim.audit.divergence import row_kl, stream_kl
from step_optim.audit.rows import Head, Rows
from tests.audit.test_divergence import float64_kl
from tests.audit.test_prefix import chat_control
from tests.models import VOCAB, Bigram, nudge, ragged_control, tiny_llama


class Encoder(nn.Module):
    """torch's own transformer layer, whose kernels depend on whether gradients are wanted."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCAB, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Causal logits."""
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        return self.head(self.layer(self.embedding(input_ids), src_mask=mask, is_causal=True))


def test_no_audit_records_a_graph() -> None:
    """From the first forward at construction on, gradients are off, in inference mode or without."""
    for model in (tiny_llama(), Bigram(), Encoder()):
        seen = []
        model.register_forward_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
        kl = TokenKL(model, chat_control(), prefix=True)
        kl.anchor()
        assert kl().mean == 0.0
        assert not any(seen)


class LatestTable(Bigram):
    """Keeps a table for the latest length only."""

    table: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Scale the embeddings by the table."""
        if self.table is None or self.table.shape[0] != input_ids.shape[1]:
            self.table = torch.linspace(0.5, 1.5, input_ids.shape[1])[:, None]
        return self.head(self.embedding(input_ids) * self.table)


def test_a_table_for_the_latest_length_is_of_use_in_training() -> None:
    """Training at the length that was audited last finds an ordinary tensor."""
    model, control = LatestTable(), ragged_control()
    kl = TokenKL(model, control, micro_batch=1)
    latest = min(len(p) + len(r) for p, r in zip(control.prompts, control.responses, strict=True))
    for _ in range(3):
        kl.anchor()
        model(torch.zeros(1, latest, dtype=torch.long)).square().sum().backward()


@pytest.mark.parametrize(("gain", "size"), [(16, 1e-4), (16, 1e-5), (32, 1e-3), (1, 1e-4)])
def test_confident_rows(gain, size) -> None:
    """Rows that are nearly certain of a token anywhere in the vocabulary are right to 1e-4, at the first reading."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 64, generator=g)
    x, step = torch.randn(48, 64, generator=g) * gain / 8, torch.randn(48, 64, generator=g)
    head = Head(weight)
    previous, candidate = Rows(x, head), Rows(x + size * step, head)
    expected = float64_kl(candidate.logits64(), previous.logits64())
    streamed = stream_kl([previous], candidate)
    assert not bool(streamed.doubtful.any())
    assert float(row_kl(previous, candidate).mean()) == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-16)


def test_a_second_reading_is_not_rounded_to_float32_on_the_way() -> None:
    """Rows with one log-ratio beyond float32's reach keep the digits of the others."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 16, generator=g)
    weight[0] = 0
    weight[0, 0] = -2000.0
    x, step = torch.randn(8, 16, generator=g), 1e-4 * torch.randn(8, 16, generator=g)
    x[:, 0], step[:, 0] = 1.0, 0.05
    weight[1:, 0] = 0
    head = Head(weight)
    previous, candidate = Rows(x, head), Rows(x + step, head)
    assert bool(stream_kl([previous], candidate).doubtful.all())
    expected = float64_kl(candidate.logits64(), previous.logits64())
    torch.testing.assert_close(row_kl(previous, candidate), expected, rtol=1e-4, atol=1e-14)


def test_prompt_tuning_is_read_at_the_response() -> None:
    """Virtual tokens stand before the prompt: the rows are those that predict response tokens all the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(tiny_llama(), config)
    control = ragged_control()

    @torch.no_grad()
    def rows() -> Tensor:
        found = []
        for prompt, response in zip(control.prompts, control.responses, strict=True):
            logits = model.eval()(torch.cat([prompt, response])[None]).logits[0, 3:]
            found.append(logits[len(prompt) - 1 : len(prompt) - 1 + len(response)])
        return torch.cat(found).double()

    before = rows()
    kl = TokenKL(model, control)
    kl.anchor()
    nudge(model, 0.5)
    wanted = float64_kl(rows(), before)
    lengths = [len(response) for response in control.responses]
    mean = sum(part.mean() for part in wanted.split(lengths)) / len(lengths)
    assert kl().mean == pytest.approx(float(mean), rel=1e-3)


def test_a_closure_of_ones_own_may_override_audit() -> None:
    """The public method takes no arguments, and what it returns is what is judged."""

    class Halved(TokenKL):
        def audit(self) -> Audit:
            found = super().audit()
            return Audit(type(found.movement)(found.movement.mean / 2), found.policy)

    model = Bigram()
    optimizer = STEPOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), Halved(model, ragged_control()), budget=1e9)
    plain = TokenKL(model, ragged_control())
    plain.anchor()
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.last.accepted.mean == pytest.approx(plain().mean / 2)
    assert optimizer.last.reference_drift.mean == pytest.approx(plain().mean)


def test_drift_comes_with_the_audit_and_is_that_of_a_pass_of_its_own() -> None:
    """A committed step reads the vocabulary once, for both; the record has the bits of a separate measurement."""
    model, control = tiny_llama(), ragged_control()
    kl = TokenKL(model, control)
    optimizer = STEPOptimizer(torch.optim.SGD(model.parameters(), lr=1e-2), kl=kl, budget=Budget(mean=math.inf))
    for seed in range(3):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        assert optimizer.last.reference_drift == kl.drift()
    assert optimizer.last.reference_drift.mean > optimizer.last.accepted.mean > 0


def test_vocabulary_ids_stay_checked() -> None:
    """A token id outside the vocabulary names its prompt, behind a shared prefix too."""
    control = ControlSet.from_ids([[1, 2, VOCAB]], [[3]])
    with pytest.raises(ValueError, match="prompt 0 of the control set has token id 61"):
        TokenKL(tiny_llama(), control, prefix=True)
