"""How many prompts does a budget need, and what does a nat per token look like? Figures from one real run.

The 135M model of the demo learns a task without any budget, and every step is audited on all prompts of the standard
control set (its parts control and held out). From the KLs of these prompts follows what smaller control sets would have
read, and how often confidence bounds are above the mean of all. On the way the model answers a few prompts, so that one
can read what a drift of so many nats per token is.

    python examples/choosing.py                # choosing.md and choosing.png: half an hour on one core; resumable
    python examples/choosing.py --smoke        # tiny random weights, in seconds: does it run?
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tiny
import torch
from smollm import DEFAULT_MODEL, ModelNotFound, find, load
from steering.world import Chat, Sets, chat, greedy, loss

from step_optim import Budget, ControlSet, STEPOptimizer, TokenKL
from step_optim.precision import upper_bound

HERE = Path(__file__).parent
SIZES = (4, 8, 16, 32, 64, 128)
SAMPLES = 2000
CONFIDENCE = 0.95
ASKED = ("Tell me something about the sea.", "How do I sleep better?")
"""Prompts that are answered on the way."""
AT = (0.0, 0.02, 0.1, 0.5, 2.0)
"""Drifts [nats per token] at which they are; the first step beyond each."""


@dataclass(frozen=True)
class Seen:
    """One step, on every prompt."""

    movement: list[float]
    """KL of each prompt from the step before [nats per token]."""
    drift: list[float]
    """KL of each prompt from the model before training."""
    answers: list[str] | None
    """What the model says to `ASKED`, greedily; None if it was not asked."""


def train(model: Any, tokenizer: Any, *, size: int, steps: int, tokens: int) -> list[Seen]:
    """Learn without a budget, and look at every step."""
    parts = [
        ControlSet.standard(model, tokenizer, size=size, part=part, max_new_tokens=tokens, progress=True)
        for part in ("control", "held_out")
    ]
    every = parts[0] + parts[1]
    seen, asked = [], list(AT)
    with Chat(model, tokenizer, Sets(every, every, every)).lesson("person", seed=0) as lesson:
        seen.append(Seen([0.0] * len(every), [0.0] * len(every), answers(lesson.model, tokenizer, tokens)))
        asked.pop(0)
        kl = TokenKL(lesson.model, every, noise_floor=False)
        trained = [p for p in lesson.model.parameters() if p.requires_grad]
        inner = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
        optimizer, rng = STEPOptimizer(inner, kl=kl, budget=Budget(mean=math.inf)), random.Random(0)
        for step in range(steps):
            lesson.model.train()
            loss(lesson.model, lesson.draw(rng)).backward()
            optimizer.step()
            optimizer.zero_grad()
            drift, moved = optimizer.last.reference_drift, optimizer.last.accepted
            told = None
            while asked and drift.mean >= asked[0]:
                asked.pop(0)
                told = answers(lesson.model, tokenizer, tokens)
            seen.append(Seen(list(moved.prompts), list(drift.prompts), told))
            print(f"step {step + 1}/{steps}: movement {moved.mean:.4f}, drift {drift.mean:.4f}", flush=True)
    return seen


def answers(model: Any, tokenizer: Any, tokens: int) -> list[str]:
    """What the model says by itself, greedily."""
    model.eval()
    said = [greedy(model, tokenizer, chat(tokenizer, text), tokens) for text in ASKED]
    return [" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in said]


@dataclass(frozen=True)
class Row:
    """What control sets of one size read, over random draws from all prompts."""

    size: int
    low: float
    """5 % of them read less than this times the mean of all."""
    high: float
    """5 % read more."""
    below: float
    """Share that read less than the mean of all."""
    bound: float
    """Median of the confidence bound over the mean of all."""
    covered: float
    """Share of bounds that are above it."""

    @property
    def line(self) -> str:
        """Of the table."""
        read = f"{self.low:.2f} to {self.high:.2f} of the mean"
        return f"| {self.size} | {read} | {self.below:.0%} | {self.bound:.2f} of the mean | {self.covered:.1%} |"


HEAD = f"| prompts | 90 % of control sets read | read too little | bound at {CONFIDENCE} (median) | bounds above it |"
RULE = "| --- | --- | --- | --- | --- |"


def rows(kls: Sequence[float], sizes: Sequence[int], samples: int = SAMPLES) -> list[Row]:
    """Draw control sets with replacement, so that all prompts stand for a population."""
    rng, mean, found = random.Random(0), sum(kls) / len(kls), []
    for size in sizes:
        draws = [rng.choices(kls, k=size) for _ in range(samples)]
        read = sorted(sum(draw) / size / mean for draw in draws)
        bounds = sorted(upper_bound(draw, CONFIDENCE) / mean for draw in draws)
        below = sum(value < 1 for value in read) / samples
        covered = sum(value >= 1 for value in bounds) / samples
        low, high = read[samples // 20], read[samples - 1 - samples // 20]
        found.append(Row(size, low, high, below, bounds[samples // 2], covered))
    return found


def report(seen: Sequence[Seen], sizes: Sequence[int]) -> str:
    """Tables, and what the model said."""
    last = seen[-1]
    prompts = len(last.drift)
    told = (
        f"{prompts} prompts of the standard control set, {len(seen) - 1} steps of AdamW (LoRA, rate 3e-3, task person)"
    )
    lines = [f"{told} without a budget; `python examples/choosing.py`."]
    for name, kls in (("The movement of the last step", last.movement), ("The drift after it", last.drift)):
        spread = float(torch.tensor(kls).std() / torch.tensor(kls).mean())
        mean = f"{sum(kls) / prompts:.4f} nats per token"
        lines += ["", f"**{name}**: mean {mean}, standard deviation over prompts {spread:.2f} of it.", "", HEAD, RULE]
        lines += [row.line for row in rows(kls, sizes)]
    lines += [
        "",
        "**What it says**, greedily, on the way:",
        "",
        f"| drift | {' | '.join(ASKED)} |",
        "| --- | --- | --- |",
    ]
    for each in seen:
        if each.answers is not None:
            mean = sum(each.drift) / len(each.drift)
            lines.append(f"| {mean:.3f} | " + " | ".join(text.replace("|", "/") for text in each.answers) + " |")
    return "\n".join(lines) + "\n"


def draw(seen: Sequence[Seen], sizes: Sequence[int], path: Path) -> None:
    """How the estimate settles, with its confidence bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    last = seen[-1]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, (title, kls) in zip(axes, (("one step", last.movement), ("drift", last.drift)), strict=True):
        found = rows(kls, sizes)
        axis.fill_between(
            sizes, [r.low for r in found], [r.high for r in found], alpha=0.25, label="90 % of control sets read"
        )
        axis.plot(sizes, [r.bound for r in found], "o-", label=f"confidence bound, {CONFIDENCE:.0%} (median)")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xlabel("prompts in the control set")
        axis.set_title(title)
    axes[0].set_ylabel("KL over the mean of all prompts")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> int:
    """Train once, then report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "choosing", help="where the finished run is")
    parser.add_argument("--out", type=Path, help="folder of table and picture (default: examples; smoke: --runs)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.runs.mkdir(parents=True, exist_ok=True)
    file = args.runs / ("smoke.json" if args.smoke else f"{args.steps}.json")
    if not file.exists():
        try:
            model, tokenizer = tiny.load() if args.smoke else load(find(DEFAULT_MODEL))[:2]
        except ModelNotFound as error:
            print(error, file=sys.stderr)
            return 2
        options = (
            {"size": 8, "steps": 2, "tokens": 4} if args.smoke else {"size": 80, "steps": args.steps, "tokens": 16}
        )
        seen = train(model, tokenizer, **options)
        file.write_text(json.dumps([asdict(each) for each in seen]), encoding="utf-8")
    seen = [Seen(**each) for each in json.loads(file.read_text(encoding="utf-8"))]
    out, sizes = args.out or (args.runs if args.smoke else HERE), SIZES[:2] if args.smoke else SIZES
    (out / "choosing.md").write_text(report(seen, sizes), encoding="utf-8")
    draw(seen, sizes, out / "choosing.png")
    print(report(seen, sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
