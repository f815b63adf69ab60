"""Is a step worth more if its lower layers are shortened more? Candidates of PPO, each shortened both ways.

Every candidate is one over-budget PPO update of the 135M model. It is shrunk to the budget with one alpha for all
layers, and with a part that grows with depth; both results are scored on the same fresh responses of theta_t: the
surrogate objective mean(ratio * advantage), and the movement there. A second setting has other prompts, another reward
and adapters on all linear layers.

    python examples/by_layer.py                          # 24 candidates, about an hour on one core
    python examples/by_layer.py --smoke                  # tiny random weights: does it run?
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import ppo
import torch
from demo.prompts import TRAINING, chat
from exchanges import control_set
from peft import LoraConfig, PeftModel, get_peft_model
from smollm import DEFAULT_MODEL, find, hush, load
from tiny import load as load_tiny

from step_optim import Budget, Interpolate, STEPOptimizer, TokenKL

CONFIG = ppo.PPOConfig(horizon=12)
FRESH = replace(CONFIG, samples=32)
"""Responses on which both results are scored."""
BUDGET = 0.02
"""Of the mean and of every slice, nats per token."""
RATE = 8e-3
OTHERS = (
    "Give me a tip for a long walk.",
    "What is a volcano?",
    "Describe your favourite season.",
    "How does a bicycle stay upright?",
)


def vowels(text: str) -> float:
    """Share of the words that begin with a vowel."""
    words = text.lower().split()
    return sum(word[0] in "aeiou" for word in words) / max(len(words), 1)


SETTINGS: dict[str, tuple[tuple[str, ...], ppo.RewardFn, object]] = {
    "long words, queries and values": (TRAINING, ppo.long_word_reward(), None),
    "vowels, all linear layers": (OTHERS, vowels, "all-linear"),
}
"""Prompts, reward, adapted layers."""


@dataclass(frozen=True)
class Pair:
    """One candidate, shortened both ways."""

    setting: str
    candidate: float
    """Its largest KL / budget."""
    straight: float
    """Surrogate objective on fresh responses, with one alpha for all layers."""
    by_layer: float
    straight_moved: float
    """KL from theta_t on those responses [nats per token]."""
    by_layer_moved: float
    straight_audits: int
    by_layer_audits: int

    @property
    def corrected(self) -> float:
        """The objective by layer, had it moved as far as the straight one: both grow like the square root of KL."""
        return self.by_layer * math.sqrt(self.straight_moved / self.by_layer_moved)


def pairs(setting: str, seed: int, updates: int, *, smoke: bool) -> Iterator[Pair]:
    """Yield the over-budget candidates of one run, which commits the straight results."""
    base, tokenizer = load_tiny() if smoke else load(find(DEFAULT_MODEL))[:2]
    questions, reward, targets = SETTINGS[setting]
    prompts = [chat(tokenizer, question) for question in questions]
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets)).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = STEPOptimizer(
        torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0),
        kl=TokenKL(model, control_set(tokenizer)),
        budget=Budget(mean=BUDGET, slices=BUDGET),
    )
    for update in range(updates):
        stream = torch.Generator().manual_seed(1_000_003 * seed + update)
        rollout = ppo.roll_out(model, tokenizer, prompts, reward, CONFIG, stream)
        fresh = ppo.roll_out(model, tokenizer, prompts, reward, FRESH, stream)
        before = [p.detach().clone() for p in trained], optimizer.state_dict(), stream.get_state()
        old = policy(model, fresh)
        found = []
        for rule in ("linear", None):  # the straight one last: it is committed
            put_back(trained, optimizer, stream, before)
            optimizer.controller = Interpolate(by_layer=rule)
            with optimizer.window():
                for loss in ppo.minibatch_losses(model, rollout, CONFIG, stream):
                    optimizer.zero_grad()
                    loss.value.backward()
                    torch.nn.utils.clip_grad_norm_(trained, CONFIG.max_grad_norm)
                    optimizer.step()
            found.append((*score(policy(model, fresh), old, fresh), optimizer.last))
        (layered, layered_moved, one), (straight, straight_moved, two) = found
        if one.triggered and two.triggered:
            ratio = max(two.candidate.mean, two.candidate.worst[1]) / BUDGET
            audits = [record.audits for record in (two, one)]
            yield Pair(setting, ratio, straight, layered, straight_moved, layered_moved, *audits)
    model.unload()


def put_back(trained: list[torch.Tensor], optimizer: STEPOptimizer, stream: torch.Generator, before: tuple) -> None:
    """Return to theta_t, and to the same random numbers."""
    weights, state, random_state = before
    with torch.no_grad():
        for p, weight in zip(trained, weights, strict=True):
            p.copy_(weight)
    optimizer.load_state_dict(state)
    stream.set_state(random_state)


@torch.no_grad()
def policy(model: PeftModel, rollout: ppo.Rollout) -> torch.Tensor:
    """[N, T, V] log-probabilities of the current weights along the responses of a rollout."""
    return ppo.response_logprobs(model, rollout.ids, rollout.mask, rollout.responses)


def score(new: torch.Tensor, old: torch.Tensor, rollout: ppo.Rollout) -> tuple[float, float]:
    """Return the surrogate objective, and the movement, both means over the live tokens."""
    ratio = (new - old).gather(-1, rollout.responses[..., None])[..., 0].exp()
    moved = (new.exp() * (new - old)).sum(-1)
    alive = rollout.alive
    mean: Callable[[torch.Tensor], float] = lambda x: float((x * alive).sum() / alive.sum())  # noqa: E731
    return mean(ratio * rollout.advantages[:, None]) - mean(rollout.advantages[:, None] * alive), mean(moved)


def interval(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def report(found: list[Pair]) -> str:
    """A table with a line for each setting, and one for all."""
    columns = (
        *("setting", "candidates", "objective, straight", "by layer", "difference", "better", "ratio"),
        *("difference at equal movement", "movement, straight", "by layer", "audits"),
    )
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for setting in (*dict.fromkeys(pair.setting for pair in found), "all"):
        chosen = [pair for pair in found if setting in (pair.setting, "all")]
        gains = [pair.by_layer - pair.straight for pair in chosen]
        equal = [pair.corrected - pair.straight for pair in chosen]
        straight, layered = fmean(p.straight for p in chosen), fmean(p.by_layer for p in chosen)
        moved = fmean(p.straight_moved for p in chosen), fmean(p.by_layer_moved for p in chosen)
        audits = fmean(p.straight_audits for p in chosen), fmean(p.by_layer_audits for p in chosen)
        lines.append(
            f"| {setting} | {len(chosen)} | {straight:.4f} | {layered:.4f} | {told(gains)} "
            f"| {sum(gain > 0 for gain in gains)} of {len(chosen)} | {layered / straight:.2f} | {told(equal)} "
            f"| {moved[0]:.4f} | {moved[1]:.4f} | {audits[0]:.1f}, {audits[1]:.1f} |"
        )
    return "\n".join(lines)


def told(values: list[float]) -> str:
    """Mean and interval."""
    low, high = interval(values)
    return f"{fmean(values):+.4f} [{low:+.4f}, {high:+.4f}]"


def main() -> int:
    """Make the candidates, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hush()
    found: list[Pair] = []
    for seed in range(args.first_seed, args.first_seed + (1 if args.smoke else args.seeds)):
        for setting in SETTINGS:
            for pair in pairs(setting, seed, args.updates, smoke=args.smoke):
                found.append(pair)
                print(len(found), asdict(pair), flush=True)
    table = report(found)
    print(table)
    if not args.smoke:
        args.out.write_text(table + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
