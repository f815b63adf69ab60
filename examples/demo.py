"""LoRA-PPO on a real language model, with STEP and without, through one learning-rate shock.

Both runs start from the same weights and draw the same random numbers. In the one with STEP, every PPO update is
one candidate: its KL on a control set is measured, and what does not fit the budget is shrunk (or rejected, or
projected) before it is committed. The other run has infinite budgets, so it is measured and never touched.

    make demo
    python examples/demo.py --controller gate --updates 6
    python examples/demo.py --model DIRECTORY_OR_HUB_ID
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path

from demo_pair import WorkerFailed, run_pair
from demo_report import RUNS, SHOCK, Limits, RunResult, comparison, takeaway
from demo_screen import Screen, open_screen
from smollm import DEFAULT_MODEL, ModelNotFound, find

CONTROLLERS = ("interpolate", "gate", "project")
EXIT_FAILED, EXIT_NO_MODEL, EXIT_INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Args:
    """What can be set on the command line."""

    model: str = DEFAULT_MODEL
    """a hub id, or a directory written by save_pretrained"""
    updates: int = 8
    """PPO updates in each run"""
    seed: int = 0
    """of the adapter's first weights and of every rollout"""
    controller: str = "interpolate"
    """what happens to an update that is over budget"""
    budget_mean: float = 0.03
    """eps_g: largest movement of one update, mean over the control set [nats per token]"""
    budget_slices: float = 0.05
    """eps_s: the same for each of its slices"""
    shock_at: int = 5
    """the update whose learning rate is four times too large, counted from 1; 0 for none"""
    out: str = "runs/demo"
    """directory for the traces and the picture"""
    tiny: bool = False
    """a tiny random model in place of --model: seconds, nothing to download"""

    @property
    def shock(self) -> int:
        """The update that is shocked; 0 if the run is over before it."""
        return self.shock_at if self.shock_at <= self.updates else 0


def parse_args(argv: list[str] | None = None) -> Args:
    """Read the command line; the docstrings above are its help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    helps = dict(re.findall(r'^    (\w+): .*\n    """(.+)"""', inspect.getsource(Args), re.M))
    for f in fields(Args):
        option, text = "--" + f.name.replace("_", "-"), f"{helps[f.name]} (default: {f.default!r})"
        if isinstance(f.default, bool):
            parser.add_argument(option, action="store_true", help=helps[f.name])
        else:
            choices = CONTROLLERS if f.name == "controller" else None
            parser.add_argument(option, type=type(f.default), default=f.default, choices=choices, help=text)
    args = Args(**vars(parser.parse_args(argv)))
    if args.updates < 1:
        parser.error(f"--updates {args.updates}: at least 1 is needed")
    if not (args.budget_mean > 0 and args.budget_slices > 0):
        parser.error("--budget-mean and --budget-slices must be above 0 nats per token")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    args = parse_args(argv)
    limits = Limits(args.budget_mean, args.budget_slices)
    screen = open_screen(args.updates, limits)
    try:
        source = "" if args.tiny else find(args.model, screen.say)
        screen.say(introduction(args))
        with screen:
            runs = run_pair(args, source, screen)
        report(runs, limits, args, screen)
    except KeyboardInterrupt:
        print("\n" + interrupted(args, screen))
        return EXIT_INTERRUPTED
    except (ModelNotFound, WorkerFailed) as error:
        print(error, file=sys.stderr)
        return EXIT_NO_MODEL if isinstance(error, ModelNotFound) else EXIT_FAILED
    return 0


def introduction(args: Args) -> str:
    """Say what will happen."""
    shock = f"; update {args.shock} gets {SHOCK:g} times the learning rate" if args.shock else ""
    model = "a tiny random model" if args.tiny else args.model
    return f"LoRA-PPO on {model}: {args.updates} updates with STEP and without, side by side{shock}."


def report(runs: list[RunResult], limits: Limits, args: Args, screen: Screen) -> None:
    """Print the comparison and the takeaway, draw the picture, and say where everything is."""
    import demo_picture

    picture = Path(args.out) / "demo.png"
    demo_picture.draw(runs, limits, args.shock, picture)
    screen.console.print("", comparison(runs, limits), "")
    print(textwrap.fill(takeaway(runs, limits, args.shock), min(screen.console.width, 100)))
    print("\nTraces: ", *(run.log for run in runs))
    print("Picture:", picture)


def interrupted(args: Args, screen: Screen) -> str:
    """Say how far it came and what there is to read."""
    if not screen.rows:
        return "Stopped before the first update was finished; nothing was written."
    done = [f"{sum(run == name for name, *_ in screen.rows)} updates {run}" for run in RUNS]
    logs = sorted(str(path) for path in Path(args.out).glob("*.jsonl"))
    return f"Stopped after {' and '.join(done)}. Their traces are in {' and '.join(logs)}; the picture was not drawn."


if __name__ == "__main__":
    sys.exit(main())
