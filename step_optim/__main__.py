"""Command line: ``python -m step_optim summary run.jsonl`` and ``python -m step_optim integrity a.jsonl b.jsonl``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from step_optim.host.paths import user_path
from step_optim.telemetry.integrity import check
from step_optim.telemetry.log import read_log
from step_optim.telemetry.record import StepRecord
from step_optim.telemetry.summary import lines, summarise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 1 if an integrity check fails, 2 if a log cannot be read."""
    parser = argparse.ArgumentParser(prog="step_optim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    summary = commands.add_parser("summary", help="trigger rate, alpha, overhead ... of logs")
    integrity = commands.add_parser("integrity", help="which controllers never acted, which runs are identical")
    for command in (summary, integrity):
        command.add_argument("logs", nargs="+", metavar="[LABEL=]LOG", help="a JSONL log, with a label if you like")
    options = parser.parse_args(arguments)
    try:
        runs = {label: read_log(path) for label, path in map(_labelled, options.logs)}
        if len(runs) < len(options.logs):
            raise ValueError("two logs have the same label; give labels, LABEL=LOG")
        return _integrity(runs) if options.command == "integrity" else _summary(runs)
    except (OSError, ValueError) as error:
        print(f"step_optim: {error}", file=sys.stderr)
        return 2


def _labelled(argument: str) -> tuple[str, str]:
    label, equals, path = argument.partition("=")
    return (label, path) if equals and not user_path(argument).exists() else (argument, argument)


def _integrity(runs: dict[str, list[StepRecord]]) -> int:
    report = check(runs)
    print(report)
    return 0 if report.ok else 1


def _summary(runs: dict[str, list[StepRecord]]) -> int:
    for label, records in runs.items():
        print(label)
        for line in lines(summarise(records)):
            print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
