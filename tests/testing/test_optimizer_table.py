"""The optimizers of other libraries are what the committed table says of them."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

import pytest

from step_optim.snapshot import known

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

SOME = (
    "torch.LBFGS",
    "bitsandbytes.AdamW8bit",
    "schedulefree.ScheduleFreeWrapper(SGD)",
    "torchao.AdamW4bit",
    "pytorch_optimizer.Lookahead(AdamW)",
    "pytorch_optimizer.MADGRAD",
    "pytorch_optimizer.LOMO",
    "pytorch_optimizer.SAM(AdamW)",
)
"""Line searches, 8-bit state, tensor subclasses, slow weights, sums, steps in the backward pass."""


@pytest.fixture
def table(monkeypatch):
    """The example, imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import optimizer_table

    disabled = logging.root.manager.disable
    yield optimizer_table
    logging.disable(disabled)  # it silences torchao for the rest of its process
    sys.modules.pop("optimizer_table")


def committed() -> dict[str, list[str]]:
    text = (EXAMPLES / "optimizer_table.md").read_text()
    rows = (line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| \w+ \| .* \| .* \| .* \|", line))
    return {
        f"{row[0].strip()}.{row[1].strip()}": [field.strip() for field in row[2:5]]
        for row in rows
        if row[0] != " library "
    }


def check_rows(table, titles):
    found = {title: table.fields(table.check_all(title)) for title in titles}
    assert found == {title: committed()[title] for title in titles}


def test_some_optimizers_are_what_the_table_says(table):
    """One of each sort, in both dtypes."""
    check_rows(table, SOME)


@pytest.mark.slow
def test_all_optimizers_are_what_the_table_says(table):
    """The whole table, made again."""
    check_rows(table, table.titles())


def test_every_optimizer_that_runs_bare_is_exact(table):
    """No row of the committed table is anything but exact, refused, or of an optimizer that fails on its own."""
    rows = committed()
    assert set(rows) == set(table.titles())
    assert len(rows) > 200
    cells = [cell for row in rows.values() for cell in row[:2]]
    assert set(cells) == {"exact", "refuse", "does not run bare"}
    assert cells.count("exact") > 0.9 * len(cells)
    assert not [row for row in rows.values() if re.search("DO NOT|NEEDS", row[2])]


def test_what_the_registries_know_is_in_the_table():
    """Each of the zoo's libraries' optimizers that is known by name has a row that says so."""
    rows = {title.split("(")[0]: row[2] for title, row in committed().items() if "exact" in row[:2]}
    libraries = {title.split(".")[0] for title in rows}
    for title, keys in known.COPIES.items():
        assert title.split(".")[0] not in libraries or rows[title].startswith(f"interpolate with {', '.join(keys)}")
    for title in known.RECOMPUTED:
        assert title.split(".")[0] not in libraries or rows[title].startswith("interpolate refused")


@pytest.mark.slow
def test_registered_optimizers_need_it(table, monkeypatch):
    """With nothing registered, none of them keeps half a step, and those that are refused find no copies."""
    named = {**known.COPIES, **known.RECOMPUTED}
    refused = set(known.RECOMPUTED)
    monkeypatch.setattr(known, "COPIES", {})
    monkeypatch.setattr(known, "RECOMPUTED", {})
    for title in table.titles():
        if title.split("(")[0] in named:
            for verdict in table.check_all(title):
                assert not verdict.exact or not verdict.interpolates, title
                assert not verdict.needs or title not in refused, title


def test_a_crash_costs_one_row(table):
    """A process that dies leaves a verdict, and the next one is tried in another."""
    workers = table.Workers(1, check=os._exit)
    found = dict(workers.run([1, 2]))
    assert [table.cell(verdict) for verdicts in found.values() for verdict in verdicts] == ["CRASHED"] * 4
