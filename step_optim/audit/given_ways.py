"""Which short ways of reading a model agree with its own logits of batches that were given."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from step_optim.audit.batches import ALL, Batch, Layout
from step_optim.audit.readable import read_checked
from step_optim.audit.reader import Reading, agree
from step_optim.audit.shortcuts import Ways, looks_ahead
from step_optim.control.control_set import ControlBatches
from step_optim.control.given import IGNORED


def find_given_ways(reading: Reading, control: ControlBatches, *, alone: bool) -> Ways:
    """Find the shortest way to read batches that agrees with the model's own logits of them.

    A batch is what the model is called with, so whatever it says of a row beside the others of its batch is right.

    Args:
        reading: how the model is read; its readout is set.
        control: the batches.
        alone: whether this process may read more batches than others do.

    Raises:
        ValueError: the model cannot read them; or it is not causal, and labels belong to the logits before them.
    """
    layout = Layout.of(control, ALL)
    *others, smallest = layout.batches
    truth = read_checked(reading, control, smallest)
    if control.shift:
        _check_causality(reading, smallest, truth)
    found = [reading.find_readout(smallest, truth)]
    for batch in others if alone else ():
        truth = read_checked(reading, control, batch)
        if reading.readout != "full" and not agree(_rows(reading, batch), truth):
            reading.readout = "full"
            found.append("the model's head has other logits on rows of some batches: those of whole ones are computed")
    return Ways(layout, ALL, tuple(why for why in found if why is not None))


def _rows(reading: Reading, batch: Batch) -> Tensor | None:
    try:
        return reading.rows(batch, readout="rows")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None


def _check_causality(reading: Reading, batch: Batch, truth: Tensor) -> None:
    """Refuse a model whose logits depend on the token that they predict; its last measured one is changed."""
    assert batch.given is not None
    ids = batch.given.inputs.get("input_ids")
    if ids is None:
        return
    labels = batch.given.labels
    known = labels[labels != IGNORED]
    a, b = int(known.min()), int(known.max())
    b = b if a != b else max(a - 1, 0)
    last = ((labels != IGNORED) * torch.arange(1, labels.shape[1] + 1, device=labels.device)).argmax(1, keepdim=True)
    changed = ids.scatter(1, last, torch.where(ids.gather(1, last) == a, b, a))
    given = replace(batch.given, inputs={**batch.given.inputs, "input_ids": changed})
    if looks_ahead(reading, replace(batch, given=given), batch, truth):
        raise ValueError(
            f"{type(reading.model).__name__} is not causal on these batches: its logits before a label depend on the "
            "token of that label, so it sees what it should predict. If the logits at t belong to label t, give "
            "ControlSet.from_batches(..., shift=False)"
        )
