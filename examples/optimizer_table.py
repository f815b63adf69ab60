"""Try every optimizer of torch, bitsandbytes, torchao, schedulefree, transformers and pytorch_optimizer under STEP.

python examples/optimizer_table.py                      # writes optimizer_table.md beside this file
python examples/optimizer_table.py --only Lookahead     # the full report of those whose title has this text
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from step_optim.testing import Verdict, check_optimizer

DTYPES = (torch.float32, torch.bfloat16)
HERE = Path(__file__).parent


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


def titles(part: str = "") -> list[str]:
    """All optimizers whose title has this text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # torchao says which of its CUDA kernels it could not load
        from optimizer_zoo import zoo

    return [entry.title for entry in zoo() if part.lower() in entry.title.lower()]


def kind(verdict: Verdict) -> str:
    """The verdict in a few words; what stands behind it is in the notes."""
    if verdict.refused:
        return "refused"
    if verdict.bare:
        return "does not run bare"
    if not verdict.exact:
        return "NOT EXACT"
    if verdict.needs:
        return "exact; shrink needs param_like"
    if verdict.shrink:
        return "exact; shrink refused" if verdict.refuses_shrink else "exact; DO NOT SHRINK"
    return "exact"


def cell(verdict: Verdict) -> str:
    """One field of the table."""
    found = kind(verdict)
    along = f", moves {', '.join(verdict.param_like)} along" if found == "exact" and verdict.param_like else ""
    return found + along + ("" if verdict.restep or not found.startswith("exact") else "; restep")


def note(verdicts: Iterable[Verdict]) -> str:
    """What else there is to say: each sentence once."""
    texts = [v.refused or v.bare or v.rollback or v.commits or v.round_trip or v.bare_round_trip for v in verdicts]
    return "; ".join(dict.fromkeys(" ".join(text.replace("|", "/").split()) for text in texts if text))


def rows(results: dict[str, list[Verdict]]) -> Iterator[str]:
    """The table in Markdown."""
    counts = [Counter(kind(verdicts[i]) for verdicts in results.values()) for i in range(len(DTYPES))]
    yield "# Optimizers under `STEPOptimizer`\n"
    yield "Made by `python examples/optimizer_table.py`: what `step_optim.testing.check_optimizer` finds, with"
    libraries = ("torch", "bitsandbytes", "torchao", "schedulefree", "transformers", "pytorch_optimizer")
    yield ", ".join(f"{name} {version(name).split('+')[0]}" for name in libraries) + ", on CPU.\n"
    yield "| outcome | " + " | ".join(map(title_of, DTYPES)) + " |"
    yield "| --- | --- | --- |"
    for name in sorted({name for count in counts for name in count}):
        yield f"| {name} | " + " | ".join(str(count[name]) for count in counts) + " |"
    yield f"| all | {len(results)} | {len(results)} |\n"
    yield "*exact*: rejected steps leave no trace, to the bit; an infinite budget and a checkpoint change nothing;"
    yield 'half a step stays half a step. *restep*: `shrink="restep"` works too.\n'
    yield "| optimizer | " + " | ".join(map(title_of, DTYPES)) + " | notes |"
    yield "| --- | --- | --- | --- |"
    for title, verdicts in results.items():
        yield f"| {title} | " + " | ".join(map(cell, verdicts)) + f" | {note(verdicts)} |"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="print the reports of optimizers whose title has this text")
    parser.add_argument("--out", type=Path, default=HERE / "optimizer_table.md", help="where to write the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[Verdict]] = {}
    start, todo = time.monotonic(), titles(args.only)
    for number, title in enumerate(todo, 1):
        results[title] = [check(title, dtype) for dtype in DTYPES]
        if args.only:
            print(*results[title], sep="\n")
        else:
            seconds = time.monotonic() - start
            print(
                f"{number:3}/{len(todo)} {seconds:4.0f} s  {title}: {' | '.join(map(cell, results[title]))}", flush=True
            )
    if not args.only:
        args.out.write_text("\n".join(rows(results)) + "\n")
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
