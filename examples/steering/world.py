"""A model, a task for it, and the prompts on which it should stay what it was."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

from steering.prompts import ELSEWHERE, PROMPTS
from steering.tasks import Example, examples
from step_optim import ControlSet

RESPONSE_TOKENS = 16
TRAIN, TEST = 256, 24


@dataclass(frozen=True)
class Sets:
    """Three sets of prompts that have none in common, with the responses of the model before training."""

    control: ControlSet
    pool: ControlSet
    held_out: ControlSet


@dataclass(frozen=True)
class Pair:
    """Token ids of one example."""

    prompt: Tensor
    response: Tensor


@dataclass(frozen=True)
class Lesson:
    """What one run works with."""

    model: Any
    """Its trained parameters require gradients."""
    train: list[Pair]
    test: list[Pair]
    """The same for every seed."""
    batch: int
    """Examples of a step."""

    def draw(self, rng: random.Random) -> list[Pair]:
        """Draw a batch."""
        return rng.sample(self.train, min(self.batch, len(self.train)))


class World(ABC):
    """What is learned, and what should stay."""

    sets: Sets
    steps: int
    """Of a run, unless another number is asked for."""

    @abstractmethod
    def lesson(self, task: str, seed: int) -> Any:
        """Return a context: a `Lesson`, with a model as it was before training."""


class Chat(World):
    """A chat model, under LoRA, and the tasks of `tasks`.

    Args:
        model: a causal language model; it is left as it was.
        tokenizer: with a chat template.
        sets: of prompts; by default those of `prompts`, with the model's answers.
    """

    steps = 20

    def __init__(self, model: Any, tokenizer: Any, sets: Sets | None = None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.sets = prompt_sets(model, tokenizer) if sets is None else sets

    @contextmanager
    def lesson(self, task: str, seed: int) -> Iterator[Lesson]:
        """Adapters on queries and values, which are taken off again."""
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(self._model, lora)
        try:
            yield Lesson(tuned, *task_data(self._tokenizer, task, seed), batch=6)
        finally:
            tuned.unload()


def prompt_sets(model: Any, tokenizer: Any) -> Sets:
    """Two prompts of each slice for the control set, six for the pool, two held out, with two slices of their own."""
    parts = {"control": slice(0, 2), "pool": slice(2, 8), "held_out": slice(8, 10)}
    found = {}
    for name, part in parts.items():
        chosen = {kind: texts[part] for kind, texts in PROMPTS.items()}
        if name == "held_out":
            chosen |= ELSEWHERE
        texts = [text for kind in chosen.values() for text in kind]
        labels = [kind for kind, members in chosen.items() for _ in members]
        found[name] = _with_responses(model, tokenizer, texts, labels)
    return Sets(**found)


def _with_responses(model: Any, tokenizer: Any, texts: list[str], labels: list[str]) -> ControlSet:
    """Take what the model says by itself, greedily."""
    prompts, responses = [], []
    for text in texts:
        prompts.append(chat(tokenizer, text))
        responses.append(greedy(model, tokenizer, prompts[-1], RESPONSE_TOKENS))
    return ControlSet.from_ids(prompts, responses, slices=labels)


def greedy(model: Any, tokenizer: Any, ids: Tensor, tokens: int) -> Tensor:
    """What the model says to one prompt, the likeliest token each time."""
    with torch.no_grad():
        out: Tensor = model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids[None]),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return out[0, len(ids) :]


def chat(tokenizer: Any, text: str) -> Tensor:
    """The ids of one user message, up to where the answer begins."""
    out = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    return torch.tensor(out["input_ids"] if hasattr(out, "keys") else out)


def pairs(tokenizer: Any, found: list[Example]) -> list[Pair]:
    """Tokenize; the response ends like a turn of the chat."""
    end = [tokenizer.eos_token_id]
    return [
        Pair(
            chat(tokenizer, each.prompt),
            torch.tensor(tokenizer(each.response, add_special_tokens=False)["input_ids"] + end),
        )
        for each in found
    ]


def task_data(tokenizer: Any, task: str, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Examples to learn from, and others to test with, which are the same for all seeds."""
    test = examples(task, TEST, seed=10_000)
    known = {example.prompt for example in test}
    train = [example for example in examples(task, TRAIN + TEST, seed) if example.prompt not in known][:TRAIN]
    return pairs(tokenizer, train), pairs(tokenizer, test)


def loss(model: nn.Module, batch: list[Pair]) -> Tensor:
    """Mean negative log-likelihood of the response tokens."""
    texts = [torch.cat([pair.prompt, pair.response]) for pair in batch]
    width = max(map(len, texts))
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (text, pair) in enumerate(zip(texts, batch, strict=True)):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
        labels[row, len(pair.prompt) : len(text)] = pair.response
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    wanted = labels[:, 1:]
    told = wanted != -100
    return nn.functional.cross_entropy(logits[told].float(), wanted[told])


def exact(model: Any, tests: list[Pair]) -> float:
    """Share of the tests whose whole response is the likeliest one, token by token."""
    right = 0
    with torch.no_grad():
        for pair in tests:
            ids = torch.cat([pair.prompt, pair.response])[None]
            said = model(input_ids=ids).logits[0, len(pair.prompt) - 1 : -1].argmax(-1)
            right += bool((said == pair.response).all())
    return right / len(tests)
