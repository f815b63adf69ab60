"""What is measured: models, a training batch, and chat control sets of any size."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from step_optim import ControlSet

sys.path.append(str(Path(__file__).parent.parent))  # demo, smollm, tiny

BATCH, LENGTH = 8, 64
"""The training batch."""

PROMPTS = 24
RESPONSE = (16, 32)
"""Response tokens: from, to."""

PREFIX = 24
"""Tokens that all prompts share, as under a chat template."""

OWN = (10, 24)
"""Tokens of a random prompt beyond the prefix."""

SLICES = ("story", "fact", "math", "code")

QWEN_VOCABULARY = 151936
SHAPES = {
    "qwen-0.5b": {"hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "inner": 4864, "vocab": QWEN_VOCABULARY},
    "qwen-1.5b": {"hidden": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "inner": 8960, "vocab": QWEN_VOCABULARY},
    "tiny": {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 64, "vocab": 512},
}
"""Shapes of random models. What a step costs does not depend on what the weights are."""


@dataclass(frozen=True)
class Workload:
    """A model that can be built as often as needed, and the texts that go with it."""

    name: str
    vocab: int
    device: torch.device
    dtype: torch.dtype
    build: Callable[[], nn.Module]
    tokenizer: Any = None
    """None for random models, which are given random ids."""

    prompts: int = PROMPTS
    """Of the control set."""

    def model(self, kind: str) -> nn.Module:
        """A model in training mode; ``kind`` is "lora" or "full"."""
        torch.manual_seed(0)
        model = self.build()
        return (lora(model) if kind == "lora" else model).to(self.device).train()

    def control(self, prompts: int | None = None, seed: int = 0) -> ControlSet:
        """Prompts in four slices, with responses of 16 to 32 tokens."""
        prompts = prompts or self.prompts
        made = self._random_control(prompts, seed) if self.tokenizer is None else self._chat_control(prompts, seed)
        return made.to(self.device)

    def batch(self, seed: int = 0) -> Tensor:
        """[8, 64] token ids to train on."""
        if self.tokenizer is None:
            generator = torch.Generator().manual_seed(seed + 1)
            return torch.randint(self.vocab, (BATCH, LENGTH), generator=generator).to(self.device)
        texts = self._chat_control(4 * BATCH, seed + 1000)
        ids = torch.cat([token for pair in zip(texts.prompts, texts.responses, strict=True) for token in pair])
        return ids[: BATCH * LENGTH].reshape(BATCH, LENGTH).to(self.device)

    def _random_control(self, prompts: int, seed: int) -> ControlSet:
        draw = random.Random(seed)

        def ids(count: int) -> list[int]:
            return [draw.randrange(self.vocab) for _ in range(count)]

        prefix = ids(PREFIX)
        texts = [(prefix + ids(draw.randint(*OWN)), ids(draw.randint(*RESPONSE))) for _ in range(prompts)]
        return ControlSet.from_ids(*zip(*texts, strict=True), slices=slices_of(prompts))

    def _chat_control(self, prompts: int, seed: int) -> ControlSet:
        draw = random.Random(seed)
        asked, answered, lengths = [], [], []
        for x in range(prompts):
            question, answer = exchange(draw, SLICES[x % len(SLICES)])
            asked.append([{"role": "user", "content": question}])
            answered.append(answer)
            lengths.append(draw.randint(*RESPONSE))
        long = ControlSet.from_texts(self.tokenizer, asked, answered)
        cut = [response[:length] for response, length in zip(long.responses, lengths, strict=True)]
        return ControlSet.from_ids(long.prompts, cut, slices=slices_of(prompts))


def slices_of(prompts: int) -> dict[str, list[int]]:
    """Deal the prompts out to the slices."""
    return {name: list(range(i, prompts, len(SLICES))) for i, name in enumerate(SLICES)}


def exchange(draw: random.Random, subject: str) -> tuple[str, str]:
    """A question of this subject, and an answer long enough to be cut anywhere: `exchanges` in other combinations."""
    from exchanges import CONTROL

    questions, answers = zip(*CONTROL[subject], strict=True)
    opening = draw.choice(("", "Please help me. ", "Be brief. ", "In other words: ", "I have to know this today. "))
    return opening + draw.choice(questions), " ".join(draw.sample(answers, len(answers)))


def lora(model: nn.Module) -> nn.Module:
    """Put LoRA of rank 8 on all linear layers but the head."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def random_llama(shape: dict[str, int], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model with tied embeddings and random weights, made on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["inner"],
        tie_word_embeddings=True,
        initializer_range=1.5 * shape["hidden"] ** -0.5,  # logits of about 1.5: a text, not noise
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_workload(name: str, shape: dict[str, int], device: torch.device, dtype: torch.dtype) -> Workload:
    """A random model of a shape."""
    return Workload(name, shape["vocab"], device, dtype, lambda: random_llama(shape, device, dtype))


def quick_workload(device: torch.device, dtype: torch.dtype) -> Workload:
    """A random model and a control set that take no time."""
    return replace(random_workload("tiny (random weights)", SHAPES["tiny"], device, dtype), prompts=8)


def pretrained_workload(name: str, device: torch.device, dtype: torch.dtype) -> Workload:
    """A real model: a directory or a hub id; the default is that of the demo."""
    import smollm

    source = smollm.find(name)
    model, tokenizer = smollm.load(source)
    vocab = model.get_input_embeddings().weight.shape[0]
    return Workload(Path(name).name, vocab, device, dtype, lambda: smollm.load(source)[0].to(device, dtype), tokenizer)


def workload(name: str | None, device: torch.device, dtype: torch.dtype) -> Workload:
    """The model that was asked for; by default the real one on a CPU, a random one of 0.5B on a GPU."""
    if name is None and device.type == "cuda":
        name = "qwen-0.5b"
    if name in SHAPES:
        return random_workload(f"{name} (random weights)", SHAPES[name], device, dtype)
    return pretrained_workload(name or default_model(), device, dtype)


def default_model() -> str:
    """The demo's."""
    from smollm import DEFAULT_MODEL

    return DEFAULT_MODEL


def real_tokens(control: ControlSet) -> int:
    """Tokens of all prompts and responses."""
    return sum(len(ids) for ids in (*control.prompts, *control.responses))


def padded_tokens(control: ControlSet) -> int:
    """The same in one padded batch."""
    lengths = [len(p) + len(r) for p, r in zip(control.prompts, control.responses, strict=True)]
    return len(lengths) * max(lengths)
