"""Telemetry: the record of a step, logs and trackers, summaries, and whether the conditions of a study differed."""

from step_optim.telemetry.log import JSONLWriter, Trace, open_log, read_log, read_trace
from step_optim.telemetry.record import StepRecord, TrialRecord
from step_optim.telemetry.summary import Summary, summarise

__all__ = [
    "JSONLWriter",
    "StepRecord",
    "Summary",
    "Trace",
    "TrialRecord",
    "open_log",
    "read_log",
    "read_trace",
    "summarise",
]
