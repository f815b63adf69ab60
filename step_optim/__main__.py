"""Command line: ``step-optim`` with ``watch``, ``report``, ``summary``, ``integrity``, ``suggest`` or ``replay``.

And ``step-optim ledger``, with the ledger of several stages.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress

from step_optim.host.paths import user_path
from step_optim.telemetry.budget_text import SYNTAX, read_budget
from step_optim.telemetry.integrity import check
from step_optim.telemetry.ledger import Ledger
from step_optim.telemetry.log import read_log
from step_optim.telemetry.record import StepRecord, jsonable
from step_optim.telemetry.replay import WORST, Replay, replay
from step_optim.telemetry.suggestion import suggest_budget
from step_optim.telemetry.summary import lines, summarise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 1 if an integrity check fails, 2 if a log cannot be read or says too little."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "watch":
            return _watch(options.log, once=options.once)
        if options.command == "ledger":
            return _ledger(options.ledger, as_json=options.json)
        logs = _by_label(options.logs)
        if options.command == "report":
            return _report(logs, options.out)
        runs = {label: read_log(path) for label, path in logs.items()}
        if options.command == "suggest":
            return _suggest(runs, options.trigger_rate, options.skip)
        if options.command == "replay":
            return _replay(runs, options)
        return _integrity(runs) if options.command == "integrity" else _summary(runs, as_json=options.json)
    except (OSError, ValueError, ImportError) as error:
        print(f"step-optim: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="step-optim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    summary = commands.add_parser("summary", help="trigger rate, alpha, overhead ... of logs")
    summary.add_argument("--json", action="store_true", help="as one JSON object, by label")
    integrity = commands.add_parser("integrity", help="which controllers never acted, which runs are identical")
    suggest = commands.add_parser("suggest", help="budgets that a wanted share of such steps would be over")
    suggest.add_argument("--trigger-rate", type=float, default=0.05, help="that share (default: 0.05)")
    suggest.add_argument("--skip", type=int, metavar="N", default=0, help="leave out the first N steps")
    replayed = commands.add_parser("replay", help="which steps another budget would have caught, and at what alpha")
    replayed.add_argument(
        "--budget", nargs="+", action="extend", required=True, metavar="LIMIT", help=f"{SYNTAX}; a number is the mean's"
    )
    replayed.add_argument("--all", action="store_true", help=f"show all caught steps, not the worst {WORST} alone")
    replayed.add_argument("--json", action="store_true", help="as one JSON object, by label")
    report = commands.add_parser("report", help="one HTML page about runs: movement, slices, drift, overhead ...")
    report.add_argument("-o", "--out", default="report.html", help="the page (default: report.html)")
    watch = commands.add_parser("watch", help="a run on the terminal, while it goes on")
    watch.add_argument("log", metavar="LOG", help="its JSONL log, which need not be there yet")
    watch.add_argument("--once", action="store_true", help="show what there is, and return")
    ledger = commands.add_parser("ledger", help="path length against displacement, over stages of training")
    ledger.add_argument("ledger", metavar="FILE", help="the ledger's JSON file")
    ledger.add_argument("--json", action="store_true", help="as one JSON object")
    for command in (summary, integrity, suggest, replayed, report):
        command.add_argument("logs", nargs="+", metavar="[LABEL=]LOG", help="a JSONL log, with a label if you like")
    return parser


def _by_label(arguments: Sequence[str]) -> dict[str, str]:
    logs = dict(map(_labelled, arguments))
    if len(logs) < len(arguments):
        raise ValueError("two logs have the same label; give labels, LABEL=LOG")
    return logs


def _labelled(argument: str) -> tuple[str, str]:
    label, equals, path = argument.partition("=")
    return (label, path) if equals and not user_path(argument).exists() else (argument, argument)


def _integrity(runs: dict[str, list[StepRecord]]) -> int:
    report = check(runs)
    print(report)
    return 0 if report.ok else 1


def _summary(runs: dict[str, list[StepRecord]], *, as_json: bool) -> int:
    figures = {label: summarise(records) for label, records in runs.items()}
    if as_json:
        print(json.dumps(jsonable(figures), indent=2, allow_nan=False))
        return 0
    for label, found in figures.items():
        print(label)
        for line in lines(found):
            print(f"  {line}")
    return 0


def _ledger(path: str, *, as_json: bool) -> int:
    if not user_path(path).exists():
        raise FileNotFoundError(f"there is no ledger {path}")
    ledger = Ledger(path)
    print(json.dumps(jsonable(ledger.figures()), indent=2, allow_nan=False) if as_json else ledger)
    return 0


def _watch(log: str, *, once: bool) -> int:
    try:
        from step_optim.report.terminal import watch
    except ImportError as error:
        raise ImportError("watch needs rich: pip install 'step-optim[report]'") from error
    with suppress(KeyboardInterrupt):
        watch(log, once=once)
    return 0


def _report(logs: dict[str, str], out: str) -> int:
    from step_optim.report import write_report

    print(write_report(logs, out))
    return 0


def _suggest(runs: dict[str, list[StepRecord]], trigger_rate: float, skip: int) -> int:
    for label, records in runs.items():
        try:
            suggestion = suggest_budget(records, trigger_rate, skip=skip)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
        print(label, *str(suggestion).splitlines(), sep="\n  ")
    return 0


def _replay(runs: dict[str, list[StepRecord]], options: argparse.Namespace) -> int:
    found = {label: _replayed(label, records, options.budget) for label, records in runs.items()}
    if options.json:
        print(json.dumps({label: each.to_dict() for label, each in found.items()}, indent=2, allow_nan=False))
        return 0
    for label, each in found.items():
        print(label, *each.lines(None if options.all else WORST), sep="\n  ")
    return 0


def _replayed(label: str, records: list[StepRecord], budget: Sequence[str]) -> Replay:
    slices = dict.fromkeys(name for record in records for name in record.candidate.slices)
    if not records:
        raise ValueError(
            f"{label}: the log has no steps, of which a budget could have caught any; give the log of a run"
        )
    try:
        return replay(records, read_budget(budget, slices))
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
