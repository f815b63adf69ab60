"""Telemetry: records of steps, logs and trackers, summaries, suggestions, and whether a study's conditions differed."""

from step_optim.telemetry.ledger import Ledger, Stage
from step_optim.telemetry.log import JSONLWriter, Trace, open_log, read_log, read_trace
from step_optim.telemetry.record import StepRecord, TrialRecord
from step_optim.telemetry.suggestion import Suggestion, suggest_budget
from step_optim.telemetry.summary import Summary, summarise

__all__ = [
    "JSONLWriter",
    "Ledger",
    "Stage",
    "StepRecord",
    "Suggestion",
    "Summary",
    "Trace",
    "TrialRecord",
    "open_log",
    "read_log",
    "read_trace",
    "suggest_budget",
    "summarise",
]
