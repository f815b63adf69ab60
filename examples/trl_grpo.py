"""TRL's GRPO has no active trust region by default. STEP gives it one, in one line.

TRL's defaults make one gradient step on each batch of completions (`num_iterations=1`). In that step the probability
ratio is exactly 1, so the clipping of the loss never acts; and `beta=0` leaves the KL penalty out. What a step does to
the policy is up to the learning rate alone.

This script trains a LoRA twice from one seed. The first run is as bare as can be and still be measured: its budget is
infinite. In the second one no step moves the policy further than the budget, in nats per token on a control set.

    python examples/trl_grpo.py                                        # tiny random model, seconds
    python examples/trl_grpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --learning-rate 5e-3   # minutes
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import smollm
import tiny
import torch
from datasets import Dataset
from demo.prompts import TRAINING, chat
from exchanges import control_set
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from step_optim import StepRecord, TokenKL, read_log
from step_optim.hosts.trainer import STEPCallback

CLIPPED = "clip_ratio/region_mean"
"""TRL's name for the share of tokens on which the clipping of the loss acted."""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="GRPO steps in each run (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=0.01, help="KL of a step, nats per token (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of adapter and completions (default: %(default)s)")
    parser.add_argument("--log", type=Path, default=Path("runs/trl_grpo"), help="folder of both logs: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=2e-2, help="at the start (default: %(default)s)")
    parser.add_argument("--model", help="a hub id or a directory (default: a tiny model of random weights)")
    return parser.parse_args()


def letters(completions: list[Any], **_: Any) -> list[float]:
    """Reward the share of letters."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(character.isalpha() for character in text) / max(len(text), 1) for text in texts]


def train(args: argparse.Namespace, budget: float, log: Path) -> tuple[list[StepRecord], float]:
    """Run GRPO; return the record of every step, and the largest share of tokens that TRL's clipping touched."""
    model, tokenizer = smollm.load(smollm.find(args.model)) if args.model else tiny.load()
    torch.manual_seed(args.seed)  # of the adapter's first weights
    trainer = GRPOTrainer(
        model,
        letters,
        # Whatever could bound a step is TRL's default: num_iterations, beta, epsilon, max_grad_norm.
        GRPOConfig(
            str(log.parent),
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=16,
            seed=args.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,  # slow on a CPU
        ),
        train_dataset=Dataset.from_dict({"prompt": [chat(tokenizer, question) for question in TRAINING]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
        callbacks=[PrintRecord()],
    )
    trainer.remove_callback(PrinterCallback)
    log.unlink(missing_ok=True)  # a log that is there would be continued

    # ---- STEP --------------------------------------------------------------------------------------------------------
    STEPCallback(kl=lambda model: TokenKL(model, control_set(tokenizer)), budget=budget, log=log).attach(trainer)
    # ------------------------------------------------------------------------------------------------------------------

    trainer.train()
    clipped = [entry[CLIPPED] for entry in trainer.state.log_history if CLIPPED in entry]
    return read_log(log), max(clipped)


class PrintRecord(TrainerCallback):
    """Prints what became of each step."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Print the head of the table."""
        print("step  proposed KL  committed KL  decision   alpha")

    def on_step_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Print the record of the step; `optimizer` is accelerate's, around STEP's."""
        last = optimizer.optimizer.last
        alpha = "" if last.alpha is None else f"{last.alpha:.3f}"  # of a step that moved nothing there is none
        print(f"{last.step:4}  {last.candidate.mean:11.5f}  {last.accepted.mean:12.5f}  {last.action:9}  {alpha}")


def main() -> None:
    """Run GRPO bare and with STEP, and compare."""
    args = parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL sets options that transformers has renamed
    args.log.mkdir(parents=True, exist_ok=True)
    largest, over = {}, {}
    for name, budget in (("bare", math.inf), ("STEP", args.budget)):
        print(f"\nGRPO {name}, budget {budget:g} nats per token")
        records, clipped = train(args, budget, args.log / f"{name.lower()}.jsonl")
        moves = [record.accepted.mean for record in records]
        largest[name], over[name] = max(moves), sum(move > args.budget for move in moves)
        print(f"TRL's clipping acted on {clipped:.0%} of the tokens")
    print(f"\nLargest KL of a step: bare {largest['bare']:.5f}, budget {args.budget:.5f}, STEP {largest['STEP']:.5f}")
    print(f"Steps over budget:    bare {over['bare']}, STEP {over['STEP']}, of {args.steps}")


if __name__ == "__main__":
    main()
