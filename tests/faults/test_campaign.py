"""The fault campaign in `tests.faults`: a seeded part of it here, all of it in the slow tests."""

from __future__ import annotations

import pytest

from tests.faults import campaign
from tests.faults.campaign import Size
from tests.faults.groups import GROUPS

KINDS = sorted({group.name.split("/")[0] for group in GROUPS})


def report(capsys: pytest.CaptureFixture[str], kind: str, size: Size) -> campaign.Tally:
    tally = campaign.run([group for group in GROUPS if group.name.startswith(f"{kind}/")], size, seed=0, quiet=True)
    with capsys.disabled():
        print(f"\n{tally}")
    return tally


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_campaign(capsys, kind) -> None:
    """A seeded sample of every kind of fault ends before or after the step, and the run goes on."""
    tally = report(capsys, kind, Size.QUICK)
    assert tally.cases.total() > 0
    assert tally.failures == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_campaign(capsys, kind) -> None:
    """Every line of a step, every write of a run, every damage."""
    assert report(capsys, kind, Size.NORMAL).failures == []
