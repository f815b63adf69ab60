"""LoRA-PPO on a real language model, with STEP and without, through one learning-rate shock.

Both runs start from the same weights and draw the same random numbers. In the one with STEP, every PPO update is
one candidate: its KL on a control set is measured, and what does not fit the budget is shrunk (or rejected, or
projected) before it is committed. The other run has infinite budgets, so it is measured and never touched.

    make demo
    python examples/demo --controller gate --updates 6
    python examples/demo --model DIRECTORY_OR_HUB_ID
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # demo, ppo, smollm, tiny

from smollm import ModelNotFound, find

from demo.arguments import Args, parse_args
from demo.pair import WorkerFailed, run_pair
from demo.report import RUNS, SHOCK, Limits, RunResult, comparison, takeaway
from demo.screen import Screen, open_screen

EXIT_FAILED, EXIT_NO_MODEL, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return the exit code."""
    args = parse_args(__doc__, argv)
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
    from demo.picture import draw

    picture = Path(args.out) / "demo.png"
    draw(runs, limits, args.shock, picture)
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
