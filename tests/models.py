"""Tiny models and hypothesis strategies that the tests share."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor, nn

from step_optim import ControlSet

VOCAB = 61
"""Vocabulary of every tiny model: a prime, so that no block or batch size divides it."""


class Bigram(nn.Module):
    """Input ids [B, T] -> logits [B, T, V]; no Hugging Face interface, every row depends on its last token alone."""

    def __init__(self, vocab: int = VOCAB, hidden: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocab, hidden)
            self.head = nn.Linear(hidden, vocab, bias=False)
        self.to(dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Read the table."""
        return self.head(self.embedding(input_ids))


def _build(config: Any, seed: int, dtype: torch.dtype, *, gain: float = 5.0) -> Any:
    """Random weights, larger than the library's own, so that tiny models do not all say the uniform distribution."""
    config.use_cache = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    return model.to(dtype)


def _common(vocab: int, hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": None,  # a padding token's embedding would be zero, and so would be its logits
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tiny_llama(
    vocab: int = VOCAB,
    hidden: int = 16,
    layers: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
) -> Any:
    """Llama: a plain linear head, tied to the embeddings if asked."""
    config = transformers.LlamaConfig(**_common(vocab, hidden, layers), tie_word_embeddings=tied)
    return _build(config, seed, dtype)


def tiny_qwen(
    vocab: int = VOCAB, hidden: int = 16, layers: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """Qwen2: attention biases, a tied head."""
    config = transformers.Qwen2Config(**_common(vocab, hidden, layers), tie_word_embeddings=True)
    return _build(config, seed, dtype)


def tiny_gpt2(
    vocab: int = VOCAB,
    hidden: int = 16,
    layers: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.1,
) -> Any:
    """GPT-2: learned positions, a tied head, dropout."""
    config = transformers.GPT2Config(
        vocab_size=vocab,
        n_embd=hidden,
        n_layer=layers,
        n_head=2,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _build(config, seed, dtype)


def tiny_gemma2(
    vocab: int = VOCAB,
    hidden: int = 16,
    layers: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    softcap: float = 3.0,
) -> Any:
    """Gemma 2: logits are soft-capped after the head, softcap * tanh(logits / softcap)."""
    config = transformers.Gemma2Config(
        **_common(vocab, hidden, layers), head_dim=8, final_logit_softcapping=softcap, query_pre_attn_scalar=8
    )
    return _build(config, seed, dtype)


def tiny_cohere(
    vocab: int = VOCAB,
    hidden: int = 16,
    layers: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.25,
) -> Any:
    """Cohere: logits are multiplied by a constant after the head."""
    config = transformers.CohereConfig(**_common(vocab, hidden, layers), logit_scale=scale)
    return _build(config, seed, dtype)


@st.composite
def control_sets(
    draw: st.DrawFn,
    vocab: int = VOCAB,
    max_prompts: int = 5,
    max_prompt_tokens: int = 5,
    max_response_tokens: int = 7,
    min_slices: int = 0,
) -> ControlSet:
    """Ragged control sets; slices overlap, and leave prompts out, as they like."""
    count = draw(st.integers(1, max_prompts))
    ids = st.integers(0, vocab - 1)
    prompts = [draw(st.lists(ids, min_size=1, max_size=max_prompt_tokens)) for _ in range(count)]
    responses = [draw(st.lists(ids, min_size=1, max_size=max_response_tokens)) for _ in range(count)]
    members = st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True)
    slices = draw(st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), members, min_size=min_slices, max_size=4))
    return ControlSet.from_ids(prompts, responses, slices)


def ragged_control(device: str = "cpu") -> ControlSet:
    """Four prompts of unequal lengths in two overlapping slices, where one example is enough."""
    return ControlSet.from_ids(
        [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12, 13]],
        [[20, 21], [22, 23, 24, 25, 26, 27, 28], [29], [30, 31, 32]],
        {"early": [0, 1], "late": [1, 2, 3]},
        device=device,
    )


def chatty_control() -> ControlSet:
    """Four prompts behind one system prompt that is long enough to be worth sharing."""
    system = list(range(7, 15))
    return ControlSet.from_ids(
        [[*system, 3, 4, 5], [*system, 6], [*system, 14, 8], [*system, 12, 10, 11]],
        [[20, 21], [22, 23, 24, 25], [29], [30, 31, 32]],
        {"early": [0, 1], "late": [1, 2, 3]},
    )


def nudge(module: nn.Module, size: float, seed: int = 1) -> None:
    """Move every trainable weight in place by about ``size`` times its own spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((noise * size * float(parameter.double().std(unbiased=False) + 1e-3)).to(parameter))
