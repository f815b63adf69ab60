"""Runs cases, counts them, and tells how to run one that failed again."""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Protocol


class Size(IntEnum):
    """How much of a group is run."""

    QUICK = 0
    NORMAL = 1
    ALL = 2


class Group(Protocol):
    """Cases that have something in common."""

    name: str

    def cases(self, size: Size, draw: random.Random) -> Iterable[str]:
        """Name the cases to run."""

    def run(self, case: str, folder: Path) -> list[str]:
        """Run one; return what is wrong."""


@dataclass
class Tally:
    """How many cases there were, and which failed."""

    cases: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds: Counter[str] = Counter()
        for group, count in self.cases.items():
            kinds[group.split("/")[0]] += count
        lines = [f"{count:7d}  {kind}" for kind, count in kinds.items()]
        return "\n".join([*lines, f"{self.cases.total():7d}  cases, {len(self.failures)} failures"])


def run(groups: Iterable[Group], size: Size, seed: int, *, quiet: bool = False) -> Tally:
    """Run groups of cases."""
    tally = Tally()
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        for group in groups:
            start = time.monotonic()
            draw = random.Random(f"{seed} {group.name}")
            found = [problem for case in group.cases(size, draw) for problem in one(group, case, Path(folder), tally)]
            if not quiet:
                seconds = time.monotonic() - start
                print(
                    f"{group.name}: {tally.cases[group.name]} cases, {len(found)} failures, {seconds:.0f} s", flush=True
                )
                print(*found, sep="\n", end="\n" if found else "", flush=True)
    gc.unfreeze()
    return tally


def one(group: Group, case: str, folder: Path, tally: Tally) -> list[str]:
    """Run one case; return its failure, if it failed."""
    try:
        problems = group.run(case, folder)
    except Exception as error:  # a fault that nothing foresaw
        problems = [f"{type(error).__name__}: {error}"]
    tally.cases[group.name] += 1
    if not problems:
        return []
    failure = f"--case '{group.name}/{case}': {'; '.join(problems)}"
    tally.failures.append(failure)
    return [failure]
