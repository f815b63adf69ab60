"""PPO with a trust region after the optimizer, against PPO, target_kl and TRPO, over learning rates.

    make classic-rl                                         # everything: hours; resumable
    python examples/classic_rl --tasks cartpole --seeds 3   # minutes
    python examples/classic_rl --report                     # table and figure of what is finished
    python examples/classic_rl --smoke                      # two updates of each, in a minute: does it run?

Every finished run is a file in runs/classic_rl; table and figure go to examples/classic_rl.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # classic_rl, finished

from finished import finished

from classic_rl.arms import ARMS
from classic_rl.report import draw, table
from classic_rl.run import Result, Setting, run
from classic_rl.tasks import TASKS

HERE = Path(__file__).parent

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="classic_rl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two updates of some arms, at one rate")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--lrs", nargs="+", type=float, default=list(RATES), help="learning rates")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="of the runs that are finished; nothing is run")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "classic_rl", help="where finished runs are")
    parser.add_argument("--out", type=Path, help="folder of table and figure (default: examples/classic_rl)")
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """All runs, those of the first seed first."""
    return [
        Setting(task, arm, lr, seed, 2 if args.smoke else TASKS[task].updates)
        for seed in range(args.seeds)
        for task in args.tasks
        for arm in args.arms
        for lr in args.lrs
    ]


def run_all(settings: list[Setting], folder: Path, jobs: int) -> dict[Setting, Result]:
    """Do the runs that were not done yet."""
    results = finished(settings, folder, Result)
    missing = [setting for setting in settings if setting not in results]
    start = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = pool.map(run, missing, [folder] * len(missing))
        for i, (setting, result) in enumerate(zip(missing, found, strict=True), 1):
            results[setting] = result
            told = f"area {result.area:.0f}, final {result.final:.0f}, largest KL {result.largest:.3f}"
            print(f"[{time.monotonic() - start:6.0f} s] {i}/{len(missing)} {setting.name}: {told}", flush=True)
    return results


def main() -> int:
    """Do what is missing, then report; return the exit code."""
    args = arguments()
    if args.smoke:
        args.tasks, args.lrs, args.seeds = args.tasks[:1], [1e-2], 1
        args.arms = ["ppo", "target_kl_0.02", "trpo_0.02", "gate_0.02", "step_0.02", "unread_0.02", "rate_0.02"]
    folder, settings = args.runs / ("smoke" if args.smoke else "all"), settings_of(args)
    results = finished(settings, folder, Result) if args.report else run_all(settings, folder, args.jobs)
    if not results:
        print(f"no finished run in {folder}", file=sys.stderr)
        return 2
    out = args.out or (folder if args.smoke else HERE)
    (out / "returns.md").write_text(table(results) + "\n", encoding="utf-8")
    draw(results, out / "returns.png")
    print(table(results))
    print(out / "returns.md", out / "returns.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
