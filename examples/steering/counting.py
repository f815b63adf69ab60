"""A world in which a run takes seconds: a Llama of 50 thousand weights that can count, and learns to count by two.

It was taught to count up and down, and that is what it should keep. The new task writes into the same weights, so that
training alone forgets all of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steering.world import Lesson, Pair, Sets, World, loss
from step_optim import ControlSet

NUMBERS = 28
"""Token ids 0 to 27; counting goes round."""

KINDS = {"up": (1, 31), "down": (-1, 30), "two": (2, 29)}
"""Step, and the token that asks for it."""

LENGTH = 12
"""Numbers that follow the first one."""

TAUGHT = 300
"""Steps of the teaching beforehand."""


class Counting(World):
    """Counting by two, learned with all weights."""

    steps = 120

    def __init__(self) -> None:
        self._before = {name: value.clone() for name, value in _taught().state_dict().items()}
        self.sets = _sets()

    @contextmanager
    def lesson(self, task: str, seed: int) -> Iterator[Lesson]:
        """All weights of the model that counts up and down; there is one task, and the seed draws the batches."""
        model = _model()
        model.load_state_dict(self._before)
        every = [_sequence("two", start) for start in range(NUMBERS)]
        yield Lesson(model, every, every, batch=16)


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def _taught() -> LlamaForCausalLM:
    """Return the model that counts up and down."""
    model, rng = _model(), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(TAUGHT):
        optimizer.zero_grad()
        loss(model, [_sequence(kind, rng.randrange(NUMBERS)) for kind in ("up", "down") for _ in range(8)]).backward()
        optimizer.step()
    return model


def _sequence(kind: str, start: int, told: int = 0) -> Pair:
    """The token that asks, the first number and those that are told; then those that follow."""
    step, ask = KINDS[kind]
    numbers = [(start + step * i) % NUMBERS for i in range(LENGTH + 1)]
    return Pair(torch.tensor([ask, *numbers[: told + 1]]), torch.tensor(numbers[told + 1 :]))


def _sets() -> Sets:
    """16 sequences that judge, 64 for the pool, 16 held out; their slices are up and down."""
    every = [(kind, start, told) for kind in ("up", "down") for start in range(NUMBERS) for told in (0, 2, 4, 6)]
    random.Random(0).shuffle(every)
    return Sets(*(_control_set(part) for part in (every[:16], every[16:80], every[80:96])))


def _control_set(part: list[tuple[str, int, int]]) -> ControlSet:
    pairs = [_sequence(*each) for each in part]
    labels = [kind for kind, _, _ in part]
    return ControlSet.from_ids([pair.prompt for pair in pairs], [pair.response for pair in pairs], slices=labels)
