"""One run of the demo: LoRA-PPO whose every update is one candidate of a `STEPOptimizer`.

`make_optimizer` holds the lines that STEP takes, and `ppo_update` the window that makes an update one candidate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import bitsandbytes as bnb
import ppo
import smollm
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from demo.prompts import TRAINING, chat, control_set
from demo.report import SHOCK, WITH, WITHOUT, RunResult
from step_optim import Budget, Controller, Gate, Interpolate, Project, STEPOptimizer, StepRecord, TokenKL

if TYPE_CHECKING:
    from demo.arguments import Args
    from demo.pair import Reporter

LOGS = {WITH: "step.jsonl", WITHOUT: "without.jsonl"}
CONTROLLERS: dict[str, type[Controller]] = {"interpolate": Interpolate, "gate": Gate, "project": Project}
CONFIG = ppo.PPOConfig(horizon=12)
FINAL_SAMPLES = 8
"""Responses for each prompt that score the last policy."""


@dataclass(frozen=True)
class Setup:
    """What both runs start from."""

    model: PreTrainedModel
    """without adapter"""
    tokenizer: PreTrainedTokenizerBase
    reward: ppo.RewardFn
    """of a response text"""
    learning_rate: float

    @property
    def prompts(self) -> list[ppo.Messages]:
        """What is trained on."""
        return [chat(self.tokenizer, question) for question in TRAINING]


def load_setup(args: Args, source: str) -> Setup:
    """Load the model, and choose the reward and learning rate that go with it."""
    smollm.hush()
    if args.tiny:
        # Random bytes hold no long words, and random weights are less sensitive than trained ones.
        return Setup(*tiny.load(), ppo.long_word_reward(minimum_letters=1), learning_rate=6e-3)
    return Setup(*smollm.load(source), ppo.long_word_reward(), learning_rate=2e-3)


def make_optimizer(args: Args, name: str, setup: Setup, model: PeftModel) -> STEPOptimizer:
    """Wrap the optimizer. An infinite budget measures and never acts: that run is the bare optimizer's, bit for bit."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    limits = Budget(mean=args.budget_mean, slices=args.budget_slices)
    return STEPOptimizer(
        bnb.optim.AdamW8bit(parameters, lr=setup.learning_rate, weight_decay=0.0),
        kl=TokenKL(model, control_set(model, setup.tokenizer)),
        budget=limits if name == WITH else Budget(mean=math.inf),
        controller=CONTROLLERS[args.controller](),
        log=Path(args.out) / LOGS[name],
    )


def ppo_update(model: PeftModel, optimizer: STEPOptimizer, rollout: ppo.Rollout, stream: torch.Generator) -> None:
    """Propose one PPO update of several minibatch steps; STEP audits and decides when the window closes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with optimizer.window():
        for loss in ppo.minibatch_losses(model, rollout, CONFIG, stream):
            optimizer.zero_grad()
            loss.value.backward()
            clip_grad_norm_(parameters, CONFIG.max_grad_norm)
            optimizer.step()


def run(args: Args, source: str, name: str, reporter: Reporter) -> RunResult:
    """Run PPO, with STEP or without, on this process's half of the cores."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    reporter.working("loading the model")
    setup = load_setup(args, source)
    log = Path(args.out) / LOGS[name]
    log.unlink(missing_ok=True)  # a log that exists would be continued
    started = time.monotonic()
    with adapted(setup.model, args.seed) as model:
        reporter.working("what the model says to the control prompts")
        optimizer = make_optimizer(args, name, setup, model)
        records = [*train(args, setup, model, optimizer, reporter)]
        reporter.working("scoring the last policy")
        final = final_reward(model, setup, random_stream(args.seed, 0))
    return RunResult(name, records, final, time.monotonic() - started, log)


def train(
    args: Args, setup: Setup, model: PeftModel, optimizer: STEPOptimizer, reporter: Reporter
) -> Iterator[StepRecord]:
    """Make the PPO updates; yield the record of each."""
    prompts = setup.prompts
    for update in range(1, args.updates + 1):
        # Keyed on the update, so that both runs see the same draws until their first different decision.
        stream = random_stream(args.seed, update)
        reporter.working(f"update {update}, sampling {len(prompts) * CONFIG.samples} responses")
        rollout = ppo.roll_out(model, setup.tokenizer, prompts, setup.reward, CONFIG, stream)
        reporter.show(rollout.texts[int(rollout.rewards.argmax())])
        factor = SHOCK if update == args.shock_at else 1.0
        optimizer.param_groups[0]["lr"] = setup.learning_rate * factor
        optimizer.note(reward=rollout.rewards.mean().item(), update=update, learning_rate_factor=factor)
        reporter.working(f"update {update}, training" + (f" at {factor:g} times the rate" if factor > 1 else ""))
        ppo_update(model, optimizer, rollout, stream)
        reporter.update(update, optimizer.last)
        yield optimizer.last


@contextmanager
def adapted(base: PreTrainedModel, seed: int) -> Iterator[PeftModel]:
    """Add a fresh LoRA adapter for the duration of one run; the base weights are never touched."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16))  # on the query and value projections
    try:
        # Dropout off: the ratio of new to old probabilities must be 1 before the first step.
        yield model.eval()
    finally:
        model.unload()


def random_stream(seed: int, update: int) -> torch.Generator:
    """Return the random numbers of one update."""
    return torch.Generator().manual_seed(1_000_003 * seed + update)


def final_reward(model: PeftModel, setup: Setup, stream: torch.Generator) -> float:
    """Return the mean reward of fresh responses to the training prompts."""
    config = replace(CONFIG, samples=FINAL_SAMPLES)
    return ppo.mean_reward(model, setup.tokenizer, setup.prompts, setup.reward, config, stream)
