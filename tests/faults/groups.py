"""All groups of cases."""

from __future__ import annotations

from tests.faults.campaign import Group
from tests.faults.checkpoints import Checkpoints
from tests.faults.kills import Kills
from tests.faults.lines import Lines
from tests.faults.logs import FullDisk, Logs
from tests.faults.values import Values
from tests.faults.worlds import SCENARIOS

KILLED = ("commit tokens", "shrink policy", "reject", "keep_state", "project", "steer", "window", "ASGD")
SAVED = ("commit tokens", "shrink policy", "steer", "ASGD", "distribution", "plain function")

GROUPS: list[Group] = [
    *(Lines(name) for name in SCENARIOS),
    *(
        Kills(name)
        for name in (
            "commit tokens",
            "shrink policy",
            "reject",
            "keep_state",
            "project",
            "steer",
            "window",
            "ASGD",
            "partial reject",
        )
    ),
    # A value head keeps its step, whatever is wrong with the policy: see tests/step/test_partial_commits.py.
    *(Values(name) for name in SCENARIOS if not name.startswith("partial")),
    Logs("shrink"),
    Logs("project"),
    FullDisk("commit tokens"),
    *(
        Checkpoints(name)
        for name in (
            "commit tokens",
            "shrink policy",
            "steer",
            "ASGD",
            "distribution",
            "plain function",
            "partial reject",
        )
    ),
]
