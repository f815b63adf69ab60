"""Telemetry: records of steps, logs and trackers, summaries, suggestions, replays, and whether conditions differed."""

from step_optim.telemetry.ledger import Ledger
from step_optim.telemetry.ledger_file import Stage
from step_optim.telemetry.log import JSONLWriter, Trace, open_log, read_log, read_trace
from step_optim.telemetry.record import StepRecord, TrialRecord
from step_optim.telemetry.replay import CaughtStep, Replay, replay
from step_optim.telemetry.suggestion import Suggestion, suggest_budget
from step_optim.telemetry.summary import Summary, summarise
from step_optim.telemetry.trackers import Tracker

__all__ = [
    "CaughtStep",
    "JSONLWriter",
    "Ledger",
    "Replay",
    "Stage",
    "StepRecord",
    "Suggestion",
    "Summary",
    "Trace",
    "Tracker",
    "TrialRecord",
    "open_log",
    "read_log",
    "read_trace",
    "replay",
    "suggest_budget",
    "summarise",
]
