"""TRL's GRPO has no active trust region by default; STEP gives it one, in three lines.

With TRL's defaults (`num_iterations=1`, `beta=0`) a batch of completions is used for one gradient step. There the
probability ratio is 1, so nothing is clipped, and the loss has no KL penalty: how far a step moves the policy is left
to the learning rate. This script trains a LoRA twice from the same seed. The bare run is measured and never touched
(its budget is infinite); in the other one STEP keeps every step within a budget of KL on a control set.

The learning rate is chosen large enough for bare steps to leave the budget. At a small one, such as TRL's default of
1e-6, none would, and both runs would be the same. A few steps on a few completions say nothing about the final reward.

    python examples/trl_grpo.py
    python examples/trl_grpo.py --model tiny
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import sys
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import smollm
import tiny
import torch
from datasets import Dataset
from demo_prompts import TRAINING, chat, control_set
from peft import LoraConfig
from ppo import long_word_reward
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from step_optim import Budget, STEPOptimizer, StepRecord, TokenKL, read_log

TINY_FACTOR = 4
"""Random weights are less sensitive than trained ones: `--model tiny` learns at so many times the rate."""


@dataclass(frozen=True)
class Args:
    """What can be set on the command line."""

    model: str = smollm.DEFAULT_MODEL
    """a hub id, a directory written by save_pretrained, or "tiny" for random weights (seconds)"""
    steps: int = 8
    """GRPO steps in each run"""
    learning_rate: float = 3e-3
    """of AdamW in the first step; TRL lets it decay linearly"""
    budget_mean: float = 0.01
    """eps_g: largest movement of one step, mean over the control set [nats per token]"""
    budget_slices: float = 0.02
    """eps_s: the same for each of its slices"""
    completions: int = 16
    """completions in one step, in groups of four for each prompt"""
    tokens: int = 16
    """tokens in a completion, at most"""
    seed: int = 0
    """of the adapter's first weights and of every completion"""
    out: str = "runs/trl_grpo"
    """directory for the two logs"""


def parse_args() -> Args:
    """Read the command line; the docstrings above are its help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    helps = dict(re.findall(r'^    (\w+): .*\n    """(.+)"""', inspect.getsource(Args), re.M))
    for f in fields(Args):
        text = f"{helps[f.name]} (default: {f.default!r})"
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default), default=f.default, help=text)
    return Args(**vars(parser.parse_args()))


def train(args: Args, source: str, budget: Budget, log: Path) -> float:
    """Run GRPO with STEP around its optimizer; return the largest share of tokens that TRL's clip acted on."""
    model, tokenizer = smollm.load(source) if source else tiny.load()
    score = long_word_reward() if source else long_word_reward(minimum_letters=1)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        scores = [score(completion[0]["content"]) for completion in completions]
        optimizer.note(reward=sum(scores) / len(scores))
        return scores

    torch.manual_seed(args.seed)  # of the adapter's first weights
    trainer = GRPOTrainer(
        model,
        reward,
        grpo_config(args, log.parent),
        train_dataset=Dataset.from_dict({"prompt": [chat(tokenizer, question) for question in TRAINING]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )

    # These three lines are all that STEP takes: TRL has made the LoRA's parameters by now.
    trainer.create_optimizer()
    kl = TokenKL(trainer.model, control_set(tokenizer))
    trainer.optimizer = optimizer = STEPOptimizer(trainer.optimizer, kl=kl, budget=budget, log=log)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(PrintRecord(optimizer))
    trainer.train()
    return max(entry.get("clip_ratio/region_mean", 0.0) for entry in trainer.state.log_history)


def grpo_config(args: Args, out: Path) -> GRPOConfig:
    """TRL's defaults for everything that bounds a step: `num_iterations`, `beta` and `epsilon` are not set."""
    return GRPOConfig(
        str(out),
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.completions,
        num_generations=4,
        max_completion_length=args.tokens,
        seed=args.seed,
        use_cpu=True,
        bf16=False,  # TRL's default is autocast to bf16, whose rounding an audit would read as movement
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class PrintRecord(TrainerCallback):
    """Prints what became of each step."""

    def __init__(self, optimizer: STEPOptimizer) -> None:
        self.optimizer = optimizer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Print the head of the table."""
        print("step  reward  KL candidate  KL accepted  worst slice     action  alpha")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Print the record of the step."""
        last = self.optimizer.last
        print(
            f"{last.step + 1:4}  {last.reward:6.3f}  {last.candidate.mean:12.5f}  {last.accepted.mean:11.5f}"
            "  {:5} {:8.5f}".format(*last.candidate.worst)
            + f"  {last.action:6}  {last.alpha:5.3f}",
            flush=True,
        )


def summary(args: Args, bare: list[StepRecord], step: list[StepRecord], clipped: float) -> str:
    """Compare the two runs."""

    def over(records: list[StepRecord]) -> int:
        limits = step[0].budget
        return sum(not limits.judge(record.accepted).feasible for record in records)

    def reward(records: list[StepRecord]) -> float:
        half = [record.reward for record in records[len(records) // 2 :]]
        return sum(half) / len(half)

    rows = {
        "largest KL of a step": [f"{max(r.accepted.mean for r in run):.5f}" for run in (bare, step)],
        "largest KL of a slice": [f"{max(r.accepted.worst[1] for r in run):.5f}" for run in (bare, step)],
        "steps over budget": [f"{over(run)} of {len(run)}" for run in (bare, step)],
        "steps shrunk": [str(sum(r.action == "shrink" for r in run)) for run in (bare, step)],
        "drift from the start": [f"{run[-1].reference_drift.mean:.5f}" for run in (bare, step)],
        "reward, second half": [f"{reward(run):.3f}" for run in (bare, step)],
    }
    head = f"Budget of a step: mean {args.budget_mean:g}, each slice {args.budget_slices:g} nats per token."
    head += f"\n\n{'':24}{'bare':>10}{'STEP':>10}"
    table = "\n".join(f"{name:24}{left:>10}{right:>10}" for name, (left, right) in rows.items())
    return f"{head}\n{table}\n\nTRL's clip acted on {clipped:.0%} of the tokens, in the step where it acted most."


def main() -> int:
    """Run GRPO bare and with STEP; return the exit code."""
    args = parse_args()
    # TRL sets options that transformers has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        source = "" if args.model == "tiny" else smollm.find(args.model)
    except smollm.ModelNotFound as error:
        print(error, file=sys.stderr)
        return 2
    if not source:
        args = replace(args, learning_rate=TINY_FACTOR * args.learning_rate)
    budgets = {"bare": Budget(mean=math.inf), "step": Budget(mean=args.budget_mean, slices=args.budget_slices)}
    logs = {name: Path(args.out) / f"{name}.jsonl" for name in budgets}
    clipped = []
    for name, budget in budgets.items():
        print(f"\nGRPO {'with STEP' if name == 'step' else 'bare'}: {budget}")
        logs[name].unlink(missing_ok=True)  # a log that exists would be continued
        clipped.append(train(args, source, budget, logs[name]))
    print("\n" + summary(args, *(read_log(log) for log in logs.values()), clipped=max(clipped)))
    print("Logs:", *logs.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
