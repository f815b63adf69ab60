"""``python -m tests.faults [--seed N] [--quick | --all] [--only KIND ...] [--case NAME]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from tests.faults import campaign
from tests.faults.campaign import Size
from tests.faults.groups import GROUPS


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Run the fault campaign.")
    parser.add_argument("--seed", type=int, default=0, help="which of the many possible cases are drawn")
    parser.add_argument("--quick", action="store_true", help="a small part of every group")
    parser.add_argument(
        "--all", action="store_true", help="every fault at every line and between all bytecodes (hours)"
    )
    parser.add_argument("--only", nargs="*", default=[""], metavar="GROUP", help="groups whose names begin like this")
    parser.add_argument("--case", help="one case, as a failure names it")
    options = parser.parse_args(arguments)
    size = Size.QUICK if options.quick else Size.ALL if options.all else Size.NORMAL
    groups = [group for group in GROUPS if group.name.startswith(tuple(options.only))]
    if options.case:
        groups = [group for group in GROUPS if options.case.startswith(f"{group.name}/")]
        for group in groups:
            group.cases = lambda *_, name=group.name: [options.case.removeprefix(f"{name}/")]
    torch.set_num_threads(1)  # as in the tests: the models are tiny
    tally = campaign.run(groups, size, options.seed)
    print(tally)
    return bool(tally.failures or not tally.cases)


if __name__ == "__main__":
    sys.exit(main())
