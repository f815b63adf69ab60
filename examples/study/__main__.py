"""Run the study: post-step controllers against KL penalties, on a real language model.

    python examples/study                   # every run in config.PLAN that is missing, then REPORT.md
    python examples/study --smoke           # a tiny random model, every condition, in minutes: does it run?
    python examples/study --device cuda     # more updates, more seeds
    python examples/study --render          # only the report, from the committed traces

It can be killed at any time, and goes on where it was. Runs are kept in runs/study; their traces, the report and its
pictures go to examples/study. The exit code is 1 if two conditions left the same trace, or a controller never acted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # study, ppo, smollm, tiny

import torch  # noqa: E402

from study.config import BRANCH_SEEDS, CUDA, CUDA_SEEDS, PILOT, PLAN, SMOKE, Batch, Study, run_settings  # noqa: E402
from study.running.work import Job, Task, TaskFailed, work_off  # noqa: E402
from study.traces import Run, load, load_runs, save, save_runs, shortened  # noqa: E402


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one for each core; 4 on a GPU)")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and a few updates")
    parser.add_argument("--pilot", action="store_true", help="only the runs by which budgets were chosen; no report")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with this in arm/condition/seed")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/study)")
    parser.add_argument("--out", type=Path, help="folder of traces, report and pictures (default: examples/study)")
    parser.add_argument("--render", action="store_true", help="only make the report, from the traces in --out")
    return parser.parse_args()


def main() -> None:
    """Make the runs, then the report."""
    args = arguments()
    name = "study" + "-smoke" * args.smoke + "-cuda" * (args.device == "cuda") + "-pilot" * args.pilot
    runs = args.runs or Path("runs") / name
    out = args.out or (runs if args.smoke or args.only or args.pilot else HERE / ("cuda" * (args.device == "cuda")))
    if not args.render:
        make(args, runs)
        if args.pilot:
            return
        collect(args, runs, out)
    report(args, out)


def make(args: argparse.Namespace, folder: Path) -> None:
    """Make the runs that are missing."""
    study = study_of(args)
    jobs = args.jobs or (4 if args.device == "cuda" else os.cpu_count() or 1)
    tasks = [task for task in dict.fromkeys(tasks_of(args)) if args.only in str(task)]
    if not tasks:
        sys.exit(f"--only {args.only}: no run has that in its name")
    from study.running import world

    try:
        world.prepare(study, folder, args.device, small=args.smoke)
        work_off(Job(study, folder, args.device, args.smoke), tasks, jobs)
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")
    except ValueError as refused:
        sys.exit(str(refused))
    except TaskFailed as failed:
        sys.exit(f"{failed}\nwhat is done is kept; the same command tries again what is not")


def tasks_of(args: argparse.Namespace) -> Iterator[Task]:
    """List what is to be done, the most important first."""
    for batch in PILOT if args.pilot else PLAN:
        for seed in seeds_of(args, batch):
            for condition in batch.conditions:
                yield Task(batch.arm, condition, seed)
    if not args.pilot:
        seeds = (0,) if args.smoke else BRANCH_SEEDS
        yield from (Task("branches", "", seed, t) for t in study_of(args).branch_at for seed in seeds)


def study_of(args: argparse.Namespace) -> Study:
    """The settings of this command line."""
    return SMOKE if args.smoke else CUDA if args.device == "cuda" else Study()


def seeds_of(args: argparse.Namespace, batch: Batch) -> tuple[int, ...]:
    """One seed shows that it runs; a GPU has time for more."""
    return (0,) if args.smoke else CUDA_SEEDS if args.device == "cuda" else batch.seeds


def collect(args: argparse.Namespace, folder: Path, out: Path) -> None:
    """Gather what is finished of the plan, in compact form."""
    done = [task for task in sorted(set(tasks_of(args)), key=str) if task.file(folder).exists()]
    found = {task: json.loads(task.file(folder).read_text()) for task in done}
    runs = [task for task in done if task.t < 0]
    for task in runs:
        if found[task]["settings"] != run_settings(study_of(args), task.arm, task.condition):
            sys.exit(f"{task.file(folder)} is a run of other settings; remove it, or choose another --runs")
    save_runs(out / "runs.jsonl.gz", (Run.from_dict(found[task]) for task in runs))
    save(out / "branches.jsonl.gz", [shortened(branch) for task in done if task.t >= 0 for branch in found[task]])


def report(args: argparse.Namespace, out: Path) -> None:
    """Check that every condition is one, and write the report."""
    from study.reporting import activation, findings

    runs, branches, study = load_runs(out / "runs.jsonl.gz"), load(out / "branches.jsonl.gz"), study_of(args)
    found = activation.check(runs, branches, study)
    print(found)
    plan = [replace(batch, seeds=seeds_of(args, batch)) for batch in PLAN]
    command = "make study" + ' ARGS="--device cuda"' * (args.device == "cuda")
    commands = ["make study-smoke"] if args.smoke else [command]
    print(f"report: {findings.write(runs, branches, out, study=study, plan=plan, commands=commands)}")
    sys.exit(0 if found.ok else 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
