"""Try every optimizer of torch, bitsandbytes, torchao, schedulefree, transformers and pytorch_optimizer under STEP.

python examples/optimizer_table.py                      # writes optimizer_table.md beside this file
python examples/optimizer_table.py --only Lookahead     # the full report of those whose title has this text
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from queue import Queue

import torch

from step_optim.testing import Finding, Kind, Verdict, check_optimizer

DTYPES = (torch.float32, torch.bfloat16)
HERE = Path(__file__).parent
LIBRARIES = ("torch", "bitsandbytes", "torchao", "schedulefree", "transformers", "pytorch_optimizer")

CRASHED = Finding("the process crashed, bare or wrapped")

Results = dict[str, list[Verdict]]


def title_of(dtype: torch.dtype) -> str:
    """Name a dtype in the table."""
    return str(dtype).removeprefix("torch.")


def check(title: str, dtype: torch.dtype) -> Verdict:
    """Try one optimizer of the zoo; what it prints and warns of on the way is its own business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimizer_zoo import zoo

        entry = next(entry for entry in zoo() if entry.title == title)
        return check_optimizer(entry.factory, dtype=dtype, train_step=entry.train)


def check_all(title: str) -> list[Verdict]:
    """Try one optimizer in every dtype, with one thread: small tensors."""
    torch.set_num_threads(1)
    return [check(title, dtype) for dtype in DTYPES]


def titles(part: str = "") -> list[str]:
    """All optimizers whose title has this text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # torchao says which of its CUDA kernels it could not load
        from optimizer_zoo import zoo

    return [entry.title for entry in zoo() if part.lower() in entry.title.lower()]


class Workers:
    """Processes that try optimizers: one that crashes takes its own row with it, and no other."""

    def __init__(self, jobs: int, check: Callable[[str], list[Verdict]] = check_all) -> None:
        self._check = check
        self._idle: Queue[ProcessPoolExecutor] = Queue()
        for _ in range(jobs):
            self._idle.put(self._new())
        self._threads = ThreadPoolExecutor(jobs)

    @staticmethod
    def _new() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def _run(self, title: str) -> list[Verdict]:
        process = self._idle.get()
        try:
            return process.submit(self._check, title).result()
        except BrokenProcessPool:
            process = self._new()
            return [Verdict(title, dtype, runs=CRASHED) for dtype in DTYPES]
        finally:
            self._idle.put(process)

    def run(self, todo: list[str]) -> Iterator[tuple[str, list[Verdict]]]:
        """The verdicts of each, in this order."""
        yield from zip(todo, self._threads.map(self._run, todo), strict=True)
        while not self._idle.empty():
            self._idle.get().shutdown()
        self._threads.shutdown()


def cell(verdict: Verdict) -> str:
    """The verdict on one dtype; what stands behind it is in the other columns."""
    if not verdict.runs:
        return "CRASHED" if verdict.runs == CRASHED else "does not run bare"
    if not verdict.accepted:
        return "refuse"
    return "exact" if verdict.exact else "NOT EXACT"


def shrinking(verdict: Verdict) -> str:
    """Which ways to shrink there are, besides a plain gate."""
    if not verdict.exact:
        return ""
    ways = {
        Kind.EXACT: ", ".join(["interpolate", *verdict.param_like]).replace(",", " with", 1),
        Kind.REFUSES_SHRINK: "interpolate refused",
        Kind.NEEDS_PARAM_LIKE: f"NEEDS param_like={verdict.needs}",
        Kind.DO_NOT_SHRINK: "DO NOT INTERPOLATE",
    }
    return ways[verdict.verdict]


def once(texts: Iterable[str]) -> list[str]:
    """Each text once, in this order, fit for a table."""
    return list(dict.fromkeys(" ".join(text.replace("|", "/").split()) for text in texts if text))


def fields(verdicts: list[Verdict]) -> list[str]:
    """The fields of a row that are sure to be the same next time: dtypes and shrinking."""
    return [*map(cell, verdicts), " / ".join(once(map(shrinking, verdicts)))]


def note(verdicts: list[Verdict]) -> str:
    """What else there is to say."""
    trouble = once(_trouble(verdict) for verdict in verdicts)
    shares = [f"{v.sticks:.2f}" for v in verdicts if v.exact and (v.param_like or not v.interpolates)]
    weights_alone = [f"weights put back alone: {' / '.join(once(shares))} stays away"] if shares else []
    return "; ".join(trouble + once(v.interpolates.why for v in verdicts if v.exact) + weights_alone)


def _trouble(verdict: Verdict) -> str:
    checks = (verdict.runs, verdict.accepted, verdict.rollback, verdict.transparent, verdict.resumes)
    return next((finding.why for finding in checks if not finding), verdict.resumes_bare.why)


def markdown(results: Results) -> Iterator[str]:
    """The table, and what it amounts to."""
    yield "# Optimizers under `STEPOptimizer`\n"
    yield "Made by `python examples/optimizer_table.py` (`make optimizers`): what `step_optim.testing.check_optimizer`"
    yield "finds, with " + ", ".join(f"{name} {version(name).split('+')[0]}" for name in LIBRARIES) + ", on CPU.\n"
    yield from counts("outcome", results, cell)
    yield from counts("of the exact ones", results, lambda verdict: shrinking(verdict).split(" with")[0].split(";")[0])
    yield "*exact*: rejected steps leave no trace, to the bit; an infinite budget changes nothing; a checkpoint goes on"
    yield "as the bare optimizer's does. *interpolate*: half a step stays half a step, once the state named is moved"
    yield "along; *refused*: it would not, and a controller that shrinks raises. `Gate` works for all.\n"
    yield "| library | optimizer | " + " | ".join(map(title_of, DTYPES)) + " | shrink | notes |"
    yield "| --- | --- |" + " --- |" * len(DTYPES) + " --- | --- |"
    for title, verdicts in results.items():
        library, name = title.split(".", 1)
        yield "| " + " | ".join([library, name, *fields(verdicts), note(verdicts)]) + " |"


def counts(title: str, results: Results, of: Callable[[Verdict], str]) -> Iterator[str]:
    """How many there are of each sort."""
    columns = [Counter(of(verdicts[i]) for verdicts in results.values()) for i in range(len(DTYPES))]
    names = sorted({name for column in columns for name in column if name})
    yield f"| {title} | " + " | ".join(map(title_of, DTYPES)) + " |"
    yield "| --- |" + " --- |" * len(DTYPES)
    for name in names:
        yield f"| {name} | " + " | ".join(str(column[name]) for column in columns) + " |"
    yield "| all | " + " | ".join(str(sum(column[name] for name in names)) for column in columns) + " |\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="print the reports of optimizers whose title has this text")
    parser.add_argument("--out", type=Path, default=HERE / "optimizer_table.md", help="where to write the table")
    parser.add_argument("--jobs", type=int, default=1, help="how many to try at a time")
    args = parser.parse_args()
    results: Results = {}
    start, todo = time.monotonic(), titles(args.only)
    for number, (title, verdicts) in enumerate(Workers(args.jobs).run(todo), 1):
        results[title] = verdicts
        seconds = time.monotonic() - start
        print(f"{number:3}/{len(todo)} {seconds:4.0f} s  {title}: {' | '.join(fields(verdicts))}", flush=True)
        if args.only:
            print(*verdicts, sep="\n")
    if not args.only:
        args.out.write_text("\n".join(markdown(results)) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
