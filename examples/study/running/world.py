"""What all runs share: the model, its prompts, the control and the held-out set, and how a policy is scored."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ppo
import smollm
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from step_optim import ControlSet
from study.config import Study, folder_settings
from study.running.prompts import SLICES, TRAINED

DRAW_SEED = 20_000_003
"""Of the responses in the control and the held-out set."""
EVALUATION = 1_000_000
"""Stands for the update in the random numbers of an evaluation: the same for every condition of a seed."""


@dataclass(frozen=True)
class World:
    """One process's share of the study."""

    study: Study
    base: PreTrainedModel
    """without adapter, in float32"""
    tokenizer: PreTrainedTokenizerBase
    reward: ppo.RewardFn
    control: ControlSet
    held_out: ControlSet
    learning_rate_factor: float = 1.0
    """random weights need larger steps than trained ones"""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.base.device

    @property
    def config(self) -> ppo.PPOConfig:
        """How an update is made."""
        return ppo.PPOConfig(**{part.name: getattr(self.study, part.name) for part in fields(ppo.PPOConfig)})

    def batch(self, stream: torch.Generator) -> list[ppo.Messages]:
        """Draw the training prompts of one update, each of another slice."""
        count = self.study.prompts_per_slice[0]
        names = [TRAINED[i] for i in torch.randperm(len(TRAINED), generator=stream)[: self.study.prompts].tolist()]
        chosen = [SLICES[name].train[int(torch.randint(count, (), generator=stream))] for name in names]
        return [chat(self.tokenizer, question) for question in chosen]

    @contextmanager
    def adapted(self, seed: int) -> Iterator[PeftModel]:
        """Add a fresh LoRA adapter for the duration of one run; the base weights are never touched."""
        study = self.study
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=study.lora_rank,
            lora_alpha=study.lora_alpha,
            lora_dropout=study.lora_dropout,
            target_modules=list(study.lora_targets),
        )
        model = get_peft_model(self.base, lora)
        try:
            yield model.eval()  # the ratio of new to old probabilities must be 1 before the first step
        finally:
            model.unload()

    def held_out_reward(self, model: PeftModel, seed: int, samples: int | None = None) -> dict[str, float]:
        """Return the mean reward of fresh responses to held-out prompts, by slice, with the seed's random numbers."""
        samples = samples or self.study.evaluation_samples
        questions = [(name, question) for name, question in prompts_of(self.study, "held_out")]
        ids, mask = ppo.encode(self.tokenizer, [chat(self.tokenizer, q) for _, q in questions], self.device)
        config = ppo.PPOConfig(samples=samples, horizon=self.study.horizon)
        responses, _ = ppo.sample(model, ids, mask, config, stream(seed, EVALUATION))
        texts = ppo.decode(responses, ppo.until_end(responses, self.tokenizer), self.tokenizer)
        rewards: dict[str, list[float]] = {name: [] for name in SLICES}
        for i, text in enumerate(texts):
            rewards[questions[i // samples][0]].append(self.reward(text))
        return {name: sum(values) / len(values) for name, values in rewards.items() if values}

    def nll(self, model: PeftModel) -> float:
        """Return the negative log-likelihood of base text: the held-out responses, which the base model drew.

        In nats per token; the mean per prompt first, then over prompts.
        """
        return mean(
            [prompt_nll(model, p, r) for p, r in zip(self.held_out.prompts, self.held_out.responses, strict=True)]
        )


def load(study: Study, folder: Path, device: str, *, small: bool = False) -> World:
    """Load the model, and the control sets that `prepare` left in a folder; ``small``: random weights, in seconds."""
    smollm.hush()
    base, tokenizer = tiny.load() if small else smollm.load(smollm.find(study.model))
    reward = ppo.long_word_reward(minimum_letters=1) if small else ppo.long_word_reward()
    sets = [ControlSet.load(folder / f"{use}.json", device=device) for use in ("control", "held_out")]
    return World(study, base.to(device), tokenizer, reward, *sets, learning_rate_factor=4.0 if small else 1.0)


def prepare(study: Study, folder: Path, device: str, *, small: bool = False) -> None:
    """Draw the responses of the control and the held-out set from the base model, once for all runs.

    Raises:
        ValueError: the folder holds a study of other settings.
    """
    smollm.hush()
    wanted = folder_settings(study)
    if once(folder / "settings.json", lambda: {"settings": wanted})["settings"] != wanted:
        raise ValueError(f"{folder} holds a study of other settings; remove it, or choose another --runs")
    for number, use in enumerate(("control", "held_out")):
        if (folder / f"{use}.json").exists():
            continue
        base, tokenizer = tiny.load() if small else smollm.load(smollm.find(study.model))
        drawn = draw_responses(study, base.to(device), tokenizer, use, stream(DRAW_SEED, number))
        folder.mkdir(parents=True, exist_ok=True)
        drawn.save(folder / f"{use}.tmp")
        os.replace(folder / f"{use}.tmp", folder / f"{use}.json")


def draw_responses(
    study: Study, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, use: str, numbers: torch.Generator
) -> ControlSet:
    """Let the base model answer the prompts of one use; movement is measured along these answers."""
    questions = prompts_of(study, use)
    ids, mask = ppo.encode(tokenizer, [chat(tokenizer, question) for _, question in questions], base.device)
    responses, _ = ppo.sample(base, ids, mask, ppo.PPOConfig(samples=1, horizon=study.horizon), numbers)
    alive = ppo.until_end(responses, tokenizer)
    names = list(dict.fromkeys(name for name, _ in questions))
    return ControlSet.from_ids(
        [row[keep.bool()] for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)],
        [row[keep] for row, keep in zip(responses.cpu(), alive.cpu(), strict=True)],
        {name: [i for i, (owner, _) in enumerate(questions) if owner == name] for name in names},
    )


def prompts_of(study: Study, use: str) -> list[tuple[str, str]]:
    """Return (slice, question) of one use: "control" or "held_out"."""
    count = study.prompts_per_slice[("train", "control", "held_out").index(use)]
    return [(name, question) for name, prompts in SLICES.items() for question in getattr(prompts, use)[:count]]


def chat(tokenizer: PreTrainedTokenizerBase, question: str) -> ppo.Messages:
    """Return the question as a chat; an empty system message replaces the template's own."""
    return [{"role": "system", "content": ""}, {"role": "user", "content": question}]


def stream(seed: int, update: int) -> torch.Generator:
    """Return the random numbers of one update: the same for every condition, so that they are paired."""
    return torch.Generator().manual_seed(1_000_003 * seed + update)


def mean(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


@torch.no_grad()
def prompt_nll(model: PeftModel, prompt: Tensor, response: Tensor) -> float:
    """Return the negative log-likelihood of one response [nats per token]."""
    logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
    logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return -logprobs.gather(1, response[:, None]).mean().item()


def once(path: Path, make: Any) -> Mapping[str, Any]:
    """Read a JSON file, or make it: several processes may, with the same content."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(make()))
        os.replace(scratch, path)
    found: Mapping[str, Any] = json.loads(path.read_text())
    return found
