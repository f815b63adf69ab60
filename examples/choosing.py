"""How many prompts does a budget need, and what does a nat per token look like? Figures from real runs.

The 135M model of the demo learns a task, three times. Once without any budget, every step audited on 160 prompts of the
standard control set: from their KLs follows what smaller control sets would have read, and how often confidence bounds
are above the mean of all. Once without any budget at a higher rate: on the way it answers a few prompts, so that one
can read what a drift of so many nats per token is. And once under a budget that chooses itself.

    python examples/choosing.py                # choosing.md and choosing.png: half an hour on one core; resumable
    python examples/choosing.py --smoke        # tiny random weights, in seconds: does it run?
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
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
AT = (0.02, 0.1, 0.3, 1.0, 2.0)
"""Drifts [nats per token] at which they are; the first step beyond each."""
WARMUP, TRIGGER_RATE = 20, 0.1
"""Of the budget that chooses itself."""


@dataclass(frozen=True)
class Plan:
    """One of the three runs."""

    name: str
    size: int
    """Prompts of the control set; and of the held-out set, if those are audited too."""
    held_out: bool
    rate: float
    steps: int
    tokens: int = 16
    """Of a response."""
    automatic: bool = False
    """Whether its budget chooses itself; there is none otherwise."""

    @property
    def file(self) -> str:
        """Where it is kept when it is finished."""
        return f"{self.name}-{self.size}-{self.rate:g}-{self.steps}.json"


REAL = (
    Plan("measured", 80, held_out=True, rate=3e-3, steps=12),
    Plan("told", 16, held_out=False, rate=1e-2, steps=20),
    Plan("automatic", 40, held_out=False, rate=1e-3, steps=60, automatic=True),
)
SMOKE = (
    Plan("measured", 8, held_out=True, rate=3e-3, steps=2, tokens=4),
    Plan("told", 8, held_out=False, rate=1e-2, steps=2, tokens=4),
    Plan("automatic", 8, held_out=False, rate=1e-3, steps=WARMUP + 2, tokens=4, automatic=True),
)


@dataclass(frozen=True)
class Seen:
    """One step."""

    movement: list[float]
    """KL of each prompt between the weights before and after what the inner optimizer proposed [nats per token]."""
    drift: list[float]
    """KL of each prompt from the model before training."""
    answers: list[str] | None = None
    """What the model says to `ASKED`, greedily; None if it was not asked."""
    over: bool = False
    """Whether the proposal was over budget."""
    budgets: dict[str, float] | None = None
    """Budgets that chose themselves, from the step that fixed them on."""


def train(model: Any, tokenizer: Any, plan: Plan) -> list[Seen]:
    """Learn, and look at every step."""
    every = standard(model, tokenizer, plan, "control")
    if plan.held_out:
        every += standard(model, tokenizer, plan, "held_out")
    with Chat(model, tokenizer, Sets(every, every, every)).lesson("person", seed=0) as lesson:
        seen = [Seen([0.0] * len(every), [0.0] * len(every), answers(lesson.model, tokenizer, plan.tokens))]
        asked = list(AT)
        trained = [p for p in lesson.model.parameters() if p.requires_grad]
        optimizer = STEPOptimizer(
            torch.optim.AdamW(trained, lr=plan.rate, weight_decay=0.0),
            kl=TokenKL(lesson.model, every, noise_floor=False),
            budget=Budget.auto(WARMUP, TRIGGER_RATE) if plan.automatic else Budget(mean=math.inf),
        )
        rng = random.Random(0)
        for step in range(plan.steps):
            lesson.model.train()
            loss(lesson.model, lesson.draw(rng)).backward()
            optimizer.step()
            optimizer.zero_grad()
            last, told = optimizer.last, None
            while asked and last.reference_drift.mean >= asked[0]:
                asked.pop(0)
                told = answers(lesson.model, tokenizer, plan.tokens)
            fixed = dict(optimizer.budget.fixed) if plan.automatic else None
            moved, drift = list(last.candidate.prompts), list(last.reference_drift.prompts)
            seen.append(Seen(moved, drift, told, last.triggered, fixed))
            figures = f"movement {last.candidate.mean:.4f}, drift {last.reference_drift.mean:.4f}"
            print(f"{plan.name}: step {step + 1}/{plan.steps}: {figures}", flush=True)
    return seen


def standard(model: Any, tokenizer: Any, plan: Plan, part: str) -> ControlSet:
    """The standard prompts of one part, answered by the model."""
    return ControlSet.standard(model, tokenizer, plan.size, part=part, max_new_tokens=plan.tokens, progress=True)


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


def report(runs: Mapping[Plan, Sequence[Seen]], sizes: Sequence[int]) -> str:
    """Tables, what the model said, and the budgets that chose themselves."""
    (measured, seen), (told, answered), (automatic, chosen) = runs.items()
    last = seen[-1]
    prompts = len(last.drift)
    shown = f"{prompts} prompts of the standard control set, {measured.steps} steps at a rate of {measured.rate:g}"
    lines = [
        "All of this: `python examples/choosing.py`; AdamW, LoRA, task person.",
        "",
        "## How many prompts",
        "",
        f"{shown} without a budget.",
    ]
    for name, kls in (("The movement of the last step", last.movement), ("The drift after it", last.drift)):
        spread = float(torch.tensor(kls).std() / torch.tensor(kls).mean())
        mean = f"{sum(kls) / prompts:.4f} nats per token"
        lines += ["", f"**{name}**: mean {mean}, standard deviation over prompts {spread:.2f} of it.", "", HEAD, RULE]
        lines += [row.line for row in rows(kls, sizes)]
    way = f"Greedy answers on the way of this run, and of {told.steps} steps at a rate of {told.rate:g}"
    lines += [
        "",
        "## What a nat per token looks like",
        "",
        f"{way}; drift on the {prompts}, and on {told.size}, prompts of the control sets [nats per token].",
        "",
        f"| drift | {' | '.join(ASKED)} |",
        "| --- | --- | --- |",
    ]
    told_at = {
        sum(each.drift) / len(each.drift): each.answers for each in (*seen, *answered) if each.answers is not None
    }
    lines += [
        f"| {drift:.3f} | " + " | ".join(text.replace("|", "/") for text in told_at[drift]) + " |"
        for drift in sorted(told_at)
    ]
    return "\n".join([*lines, "", *self_chosen(automatic, chosen)]) + "\n"


def self_chosen(plan: Plan, seen: Sequence[Seen]) -> list[str]:
    """What came out of a warm-up, and how many of the steps after it were over these budgets."""
    after = seen[1 + WARMUP :]
    fixed = seen[-1].budgets or {}
    during, later = (
        " to ".join(f"{f(sum(s.movement) / len(s.movement) for s in part):.4f}" for f in (min, max))
        for part in (seen[1 + WARMUP // 4 : 1 + WARMUP], after)
    )
    over = sum(step.over for step in after)
    run = f"`Budget.auto(warmup={WARMUP}, trigger_rate={TRIGGER_RATE})`, {plan.steps} steps at a rate of {plan.rate:g}"
    movement = f"{during} in the warm-up, whose first quarter is left out, and {later} after it"
    return [
        "## A budget that chooses itself",
        "",
        f"{run}, {plan.size} prompts. Movement of a step [nats per token]: {movement}.",
        f"Over one of the budgets: {over} of {len(after)} steps.",
        "",
        "| budget | nats per token |",
        "| --- | --- |",
        *(f"| {name} | {value:.4f} |" for name, value in fixed.items()),
    ]


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
    """Train three times, then report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "choosing", help="where finished runs are")
    parser.add_argument("--out", type=Path, help="folder of table and picture (default: examples; smoke: --runs)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.runs.mkdir(parents=True, exist_ok=True)
    plans, runs = SMOKE if args.smoke else REAL, dict[Plan, list[Seen]]()
    for plan in plans:
        file = args.runs / plan.file
        if not file.exists():
            try:
                model, tokenizer = tiny.load() if args.smoke else load(find(DEFAULT_MODEL))[:2]
            except ModelNotFound as error:
                print(error, file=sys.stderr)
                return 2
            file.write_text(json.dumps([asdict(each) for each in train(model, tokenizer, plan)]), encoding="utf-8")
        runs[plan] = [Seen(**each) for each in json.loads(file.read_text(encoding="utf-8"))]
    out, sizes = args.out or (args.runs if args.smoke else HERE), SIZES[:2] if args.smoke else SIZES
    text = report(runs, sizes)
    (out / "choosing.md").write_text(text, encoding="utf-8")
    draw(runs[plans[0]], sizes, out / "choosing.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
