"""What a step costs in torch operations, which no machine disturbs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from step_optim import ControlSet, STEPOptimizer, TokenKL

OWN = 800
"""Operations of a committed step besides the bare step and the control forward: 474 when this was written; 5,407 were
the beginning."""


class Counting(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def count(run: Callable[[], Any]) -> int:
    """How many operations something makes."""
    with Counting() as counting:
        run()
    return counting.seen.total()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """30 layers with LoRA on all linears: 420 trained tensors; tiny widths, so that only their number counts."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=30,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)


def test_a_committed_step_makes_few_operations_of_its_own(model) -> None:
    """As many as the model has layers would be thousands; a plan is made once, and then all tensors go together."""
    control = ControlSet.from_ids([[1, 2, 3], [4, 5], [7, 8], [9]], [[7, 8, 9], [10], [11, 12], [3, 4, 5, 6]])
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 420
    kl = TokenKL(model, control, noise_floor=False, micro_batch=4)
    optimizer = STEPOptimizer(torch.optim.AdamW(trained, lr=1e-4), kl=kl, budget=1.0)

    def push(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in trained:
            p.grad = torch.randn(p.shape, generator=generator)

    for step in range(3):
        push(step)
        optimizer.step()
    push(3)
    whole = count(optimizer.step)
    assert optimizer.last.action == "commit"
    bare = count(optimizer.optimizer.step)
    ids = torch.ones(4, 7, dtype=torch.long)
    with torch.no_grad():
        forward = count(lambda: model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)))
    assert whole - bare - forward <= OWN
