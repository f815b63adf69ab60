"""One page about runs, from their logs: ``step-optim report RUN.jsonl -o report.html``."""

from step_optim.report.page import write_report

__all__ = ["write_report"]
