"""How far does a budget on a small control set carry? Held-out over control movement, by size, for two controllers.

The 135M model of the demo learns a task inside a budget on its control set: with `Interpolate` under a budget on every
step, and with `Steer` under a cap on the drift, directions from a pool. Control sets of 4 to 128 standard prompts
judge, with confidence and without. 40 other prompts are measured, and decide nothing.

    python examples/control_sizes.py                 # control_sizes.md: two hours on one core; resumable
    python examples/control_sizes.py --smoke         # tiny random weights: does it run?
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import tiny
import torch
from finished import finished, once
from smollm import DEFAULT_MODEL, ModelNotFound, find, load
from steering.world import Chat, Sets, loss

from step_optim import Budget, Controller, ControlSet, Interpolate, Steer, STEPOptimizer, TokenKL

HERE = Path(__file__).parent
SIZES = (4, 8, 16, 32, 64, 128)
STEP, CAP = 0.005, 0.02
"""Nats per token: the budget of a step under `Interpolate`, the cap on the drift under `Steer`."""
CONTROLLERS: dict[str, Controller] = {"shrink": Interpolate(), "steer": Steer()}


@dataclass(frozen=True)
class Setting:
    """What tells one run from another."""

    arm: str
    size: int
    confidence: float | None
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its file."""
        sure = "plain" if self.confidence is None else f"{self.confidence:g}"
        return f"{self.arm}-{self.size}-{sure}-{self.seed}-{self.steps}"

    @property
    def budget(self) -> Budget:
        """A limit on each step, or a cap on the drift."""
        limits = {"mean": STEP} if self.arm == "shrink" else {"drift": CAP}
        return Budget(**limits, confidence=self.confidence)


@dataclass(frozen=True)
class Result:
    """Nats per token; of the step's movement under shrinking, of the drift under steering."""

    control: float
    """Mean of the measured steps (movement), or at the end (drift)."""
    held_out: float
    ratio: float
    low: float
    high: float
    """Of the ratio's 95 % interval over prompts."""


def run(setting: Setting, world: Chat, folder: Path) -> Result:
    """Do one run, or read what it ended with if it was done before."""

    def do() -> Result:
        with world.lesson("person", setting.seed) as lesson, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of small control sets: the table shows them
            return learn(setting, lesson, world.sets)

    return once(setting, folder, Result, do)


def learn(setting: Setting, lesson: Any, sets: Sets) -> Result:
    """Learn the task, and measure the held-out prompts at every third step."""
    kl = TokenKL(
        lesson.model,
        nested(sets.control, setting.size),
        pool=sets.pool if setting.arm == "steer" else None,
        held_out=sets.held_out,
        every=min(3, setting.steps),
        noise_floor=False,
    )
    trained = [p for p in lesson.model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    controller = CONTROLLERS[setting.arm]
    optimizer = STEPOptimizer(inner, kl=kl, budget=setting.budget, controller=controller)
    rng, records = random.Random(setting.seed), []
    for _ in range(setting.steps):
        lesson.model.train()
        loss(lesson.model, lesson.draw(rng)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.last.held_out is not None:
            records.append(optimizer.last)
    summary = optimizer.summary()
    if setting.arm == "shrink":
        here = [record.accepted.mean for record in records]
        there = [record.held_out.mean for record in records]
        found, name = (sum(here) / len(here), sum(there) / len(there)), "generalisation_step"
    else:
        found, name = (records[-1].reference_drift.mean, records[-1].held_out_drift.mean), "generalisation_drift"
    return Result(*found, summary[name], summary[f"{name}_low"], summary[f"{name}_high"])


def nested(control: ControlSet, size: int) -> ControlSet:
    """Take the first prompts of every slice in turn, so that a larger set holds a smaller one."""
    turns = chain.from_iterable(zip_longest(*control.slices.values()))
    return control.select([i for i in turns if i is not None][:size])


def table(results: dict[Setting, Result]) -> str:
    """By size, with the ranges over seeds."""
    first = next(iter(results))
    seeds = len({setting.seed for setting in results})
    what = f"shrink: movement, a budget of {STEP} on each step; steer: drift, a cap of {CAP}"
    run_of = (
        f"{'one seed' if seeds == 1 else f'{seeds} seeds'}, {first.steps} steps of AdamW (LoRA, rate 1e-2, task person)"
    )
    lines = [
        f"Held-out over control, {run_of}; {what}; `python examples/control_sizes.py`.",
        "",
        "| controller | prompts | confidence | control | held out | ratio | 95 % interval | held out / budget |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, int, float | None], list[Result]] = {}
    for setting, result in results.items():
        groups.setdefault((setting.arm, setting.size, setting.confidence), []).append(result)
    for (arm, size, confidence), found in groups.items():
        mean = {name: sum(getattr(r, name) for r in found) / len(found) for name in asdict(found[0])}
        limit = STEP if arm == "shrink" else CAP
        lines.append(
            f"| {arm} | {size} | {confidence or 'none'} | {mean['control']:.4f} | {mean['held_out']:.4f} | "
            f"{mean['ratio']:.2f} | {mean['low']:.2f} to {mean['high']:.2f} | {mean['held_out'] / limit:.2f} |"
        )
    return "\n".join(lines) + "\n"


def world_of(model: Any, tokenizer: Any, folder: Path, *, small: bool) -> Chat:
    """The task's world, with standard prompts; the model's responses are kept in the folder."""
    sizes = {"control": 8, "pool": 16, "held_out": 8} if small else {"control": 128, "pool": 96, "held_out": 40}
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for part, size in sizes.items():
        file = folder / f"{part}.json"
        if not file.exists():
            tokens = 4 if small else 16
            drawn = ControlSet.standard(model, tokenizer, size, part=part, max_new_tokens=tokens, progress=True)
            drawn.save(file)
        found[part] = ControlSet.load(file)
    return Chat(model, tokenizer, Sets(**found))


def settings(sizes: Sequence[int], arms: Sequence[str], seeds: int, steps: int) -> list[Setting]:
    """All runs, the small ones first."""
    return [
        Setting(arm, size, confidence, seed, steps)
        for seed in range(seeds)
        for arm in arms
        for size in sizes
        for confidence in (None, 0.95)
    ]


def run_all(wanted: Sequence[Setting], folder: Path, *, small: bool) -> dict[Setting, Result]:
    """Do the runs that were not done yet."""
    model, tokenizer = tiny.load() if small else load(find(DEFAULT_MODEL))[:2]
    world, results = world_of(model, tokenizer, folder, small=small), {}
    for setting in wanted:
        result = results[setting] = run(setting, world, folder)
        print(f"{setting.name}: held out over control {result.ratio:.2f}", flush=True)
    return results


def main() -> int:
    """Do what is missing, then write the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, two sizes, two steps")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--arms", choices=list(CONTROLLERS), nargs="+", default=list(CONTROLLERS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--report", action="store_true", help="of the runs that are finished; nothing is run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "control_sizes", help="where finished runs are")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.sizes, args.steps, args.runs = [4, 8], 2, args.runs / "smoke"
    wanted = settings(args.sizes, args.arms, args.seeds, args.steps)
    try:
        results = finished(wanted, args.runs, Result) if args.report else run_all(wanted, args.runs, small=args.smoke)
    except ModelNotFound as error:
        print(error, file=sys.stderr)
        return 2
    if not results:
        print(f"no finished run in {args.runs}", file=sys.stderr)
        return 2
    path = (args.runs if args.smoke else HERE) / "control_sizes.md"
    path.write_text(table(results), encoding="utf-8")
    print(table(results), path, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
