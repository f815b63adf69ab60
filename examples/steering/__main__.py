"""Learn a task inside a ball: a cap on the drift, held by shrinking or by steering, against penalties and nothing.

    make steering                                      # a Llama that can count learns to count by two: minutes
    python examples/steering --model real              # the 135M model of the demo: hours on a CPU; resumable
    python examples/steering --model real --tasks person --seeds 1 --lrs 5e-3 --arms bare steer
    python examples/steering --grid --seeds 1          # options of Steer around their defaults: half an hour
    python examples/steering --model real --report     # the table of what is finished
    python examples/steering --smoke                   # tiny random weights, in a minute: does it run?

Every finished run is a file in runs/steering; tables and pictures go to examples/steering.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # steering, smollm, tiny

import tiny
import torch
from finished import finished
from smollm import DEFAULT_MODEL, ModelNotFound, find, load

from steering.arms import ARMS, GRID
from steering.counting import Counting
from steering.report import draw, table
from steering.run import Result, Setting, run
from steering.tasks import TASKS
from steering.world import Chat, World

HERE = Path(__file__).parent


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="steering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, a few steps, three arms")
    parser.add_argument("--model", choices=("counting", "real"), default="counting")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="of the real model")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--grid", action="store_true", help="the options of Steer, one at a time: a table of its own")
    parser.add_argument("--lrs", nargs="+", type=float, default=[1e-3, 3e-3, 1e-2], help="learning rates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of a run (default: 120 counting, 20 of the real model)")
    parser.add_argument("--report", action="store_true", help="of the runs that are finished; nothing is run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "steering", help="where finished runs are")
    parser.add_argument(
        "--out", type=Path, help="folder of table and picture (default: examples/steering; smoke: --runs)"
    )
    return parser.parse_args()


def world_of(name: str) -> World:
    """Build a world; of the chat models the responses are what they say by themselves."""
    if name == "counting":
        return Counting()
    model, tokenizer = tiny.load() if name == "smoke" else load(find(DEFAULT_MODEL))[:2]
    print("what the model says by itself on all prompts ...", flush=True)
    return Chat(model, tokenizer)


def run_all(settings: list[Setting], name: str, folder: Path) -> dict[Setting, Result]:
    """Do the runs that were not done yet."""
    world, results, start = world_of(name), {}, time.monotonic()
    for i, setting in enumerate(settings):
        result = results[setting] = run(setting, world, folder)
        done = f"[{time.monotonic() - start:6.0f} s] {i + 1}/{len(settings)} {setting.name}"
        told = f"NLL {result.nll:.3f}, held-out drift {result.held_out:.3f}, {result.rejected} rejected"
        print(f"{done}: {told}", flush=True)
    return results


def main() -> int:
    """Do what is missing, then report; return the exit code."""
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.steps, args.seeds, args.lrs, args.tasks = 6, 1, [1e-2], args.tasks[:1]
        args.arms = ["bare", "penalty_1", "steer"]
    if args.grid:
        args.arms = list(GRID)
    name = "smoke" if args.smoke else args.model
    steps = args.steps or (Counting if name == "counting" else Chat).steps
    settings = [
        Setting(task, arm, lr, seed, steps)
        for seed in range(args.seeds)
        for task in (["counting"] if name == "counting" else args.tasks)
        for lr in args.lrs
        for arm in args.arms
    ]
    try:
        results = (
            finished(settings, args.runs / name, Result) if args.report else run_all(settings, name, args.runs / name)
        )
    except ModelNotFound as error:
        print(error, file=sys.stderr)
        return 2
    if not results:
        print(f"no finished run in {args.runs / name}", file=sys.stderr)
        return 2
    out = args.out or (args.runs / name if args.smoke else HERE)
    written = [out / (f"{name}_grid.md" if args.grid else f"{name}.md")]
    written[0].write_text(table(results) + "\n", encoding="utf-8")
    if not args.grid:
        written.append(out / f"{name}.png")
        draw(results, written[1])
    print(table(results))
    print(*written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
