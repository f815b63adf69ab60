"""Measure what a training step under STEPOptimizer costs: time, memory, audits, numerics.

    python examples/bench                                # the real 135M model on a CPU, or a random 0.5B on a GPU
    python examples/bench --quick                        # a tiny model, seconds: does it run?
    python examples/bench --only step --rounds 9
    python examples/bench --render runs/bench/cpu.json   # table and picture from an earlier run

Tables and pictures go to examples/bench (those of a part to runs/bench), the raw figures to runs/bench, section by
section. The real model takes some two hours on one thread; --seconds 3600 leaves out optional points after an hour.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from curves import measure_curves
from graph import measure_graph
from measure import clean
from noise import measure_noise
from numerics import measure_numerics
from picture import draw
from progress import Progress
from report import markdown
from search_costs import measure_searches
from step_costs import measure_steps
from workload import Workload, padded_tokens, quick_workload, real_tokens, workload

HERE = Path(__file__).parent
RAW = Path("runs") / "bench"
SECTIONS = ("step", "search", "curves", "numerics", "noise", "graph")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--rounds", type=int, help="interleaved repetitions (default: 5; quick: 2)")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections (default: %(default)s)")
    parser.add_argument("--model", help="a directory, a hub id, or qwen-0.5b, qwen-1.5b, tiny: random weights")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few points")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after these, optional points are skipped")
    parser.add_argument(
        "--out", type=Path, help="folder of the report (default: examples/bench; of a part, or quick: runs/bench)"
    )
    parser.add_argument("--render", type=Path, help="only make the report, from the raw figures of an earlier run")
    parser.add_argument("--resume", action="store_true", help="keep the sections that an interrupted run finished")
    args = parser.parse_args()
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.only = tuple(args.only.split(","))
    if unknown := set(args.only) - set(SECTIONS):
        parser.error(f"--only: unknown sections {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    return args


def main() -> None:
    """Measure and report."""
    args = arguments()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what peft calls
    out = args.out or (RAW if args.quick or args.only != SECTIONS else HERE)  # a part does not replace the whole
    if args.render:
        report(json.loads(args.render.read_text()), out)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    progress = Progress(args.seconds)
    found = quick_workload(device, dtype) if args.quick else workload(args.model, device, dtype)
    result = measure(args, found, progress)
    report(result, out)
    sys.exit(any(name not in result["sections"] for name in args.only))


def measure(args: argparse.Namespace, found: Workload, progress: Progress) -> dict[str, Any]:
    """Run the sections, and write the raw figures after each."""
    raw = (args.out or RAW if args.quick else RAW) / f"{machine.slug(found.device)}{'-quick' * args.quick}.json"
    raw.parent.mkdir(parents=True, exist_ok=True)
    result = header(args, found, raw.stem)
    if args.resume and raw.exists():
        earlier = json.loads(raw.read_text())
        result["sections"], progress.skipped = earlier["sections"], earlier["skipped"]
    for name, section in sections(args, found, progress).items():
        if name in args.only and name not in result["sections"]:
            progress.say(f"section {name}")
            try:
                result["sections"][name] = section()
            except Exception as error:  # the other sections are still worth having
                traceback.print_exc()
                progress.skip(f"section {name}", f"{type(error).__name__}: {str(error)[:200]}")
            result["skipped"] = progress.skipped
            raw.write_text(json.dumps(result, indent=1))
            clean(found.device)
    progress.say(f"raw figures: {raw}")
    return result


def sections(args: argparse.Namespace, found: Workload, progress: Progress) -> dict[str, Callable[[], Any]]:
    """What can be measured, by name."""
    return {
        "step": lambda: measure_steps(found, args.rounds, progress),
        "search": lambda: measure_searches(found, 2 if args.quick else 3, progress),
        "curves": lambda: measure_curves(found, args.rounds, args.quick, progress),
        "numerics": lambda: measure_numerics(found),
        "noise": lambda: measure_noise(found, progress),
        "graph": lambda: measure_graph(found, args.rounds, progress),
    }


def header(args: argparse.Namespace, found: Workload, name: str) -> dict[str, Any]:
    """What a report says before its figures."""
    control = found.control()
    return {
        "name": name,
        "command": " ".join(["python examples/bench", *sys.argv[1:]]),
        "machine": machine.describe(found.device, found.dtype),
        "model": found.name,
        "rounds": args.rounds,
        "control": {
            "prompts": len(control),
            "rows": control.response_tokens,
            "real": real_tokens(control),
            "padded": padded_tokens(control),
        },
        "sections": {},
        "skipped": [],
    }


def report(result: dict[str, Any], out: Path) -> None:
    """Write the table and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    text, picture = out / f"{result['name']}.md", out / f"{result['name']}.png"
    text.write_text(markdown(result))
    print(f"table: {text}")
    if draw(result, picture):
        print(f"picture: {picture}")


if __name__ == "__main__":
    main()
