"""All groups of cases."""

from __future__ import annotations

from tests.faults.campaign import Group
from tests.faults.lines import Lines
from tests.faults.values import Values
from tests.faults.worlds import SCENARIOS

GROUPS: list[Group] = [*(Lines(name) for name in SCENARIOS), *(Values(name) for name in SCENARIOS)]
