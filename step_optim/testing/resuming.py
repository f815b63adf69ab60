"""The checkpoint test: what is saved in the middle of a run and loaded into a fresh optimizer, and how it goes on."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step_optim.testing.probe import Probe, Setup, brief
from step_optim.testing.verdict import Finding

SAVED_AT = 6

BARE: dict[str, Any] | None = None
WRAPPED: dict[str, Any] | None = {}


@dataclass(frozen=True)
class Checkpoint:
    """A file, and the weights that belong to it."""

    file: bytes
    weights: Tensor

    @staticmethod
    def of(probe: Probe) -> Checkpoint:
        """Save an optimizer."""
        file = io.BytesIO()
        torch.save(probe.optimizer.state_dict(), file)
        return Checkpoint(file.getvalue(), probe.weights)

    def load(self, *, weights_only: bool) -> Any:
        """Read the state dict."""
        return torch.load(io.BytesIO(self.file), weights_only=weights_only)

    @property
    def is_plain(self) -> bool:
        """Whether torch loads it with its default ``weights_only=True``."""
        try:
            self.load(weights_only=True)
        except Exception:
            return False
        return True


def check_resuming(setup: Setup, steps: int) -> tuple[Finding, Finding]:
    """Return what is wrong with saving and loading the bare optimizer, and what the wrapper adds to that.

    The wrapped optimizer's checkpoint has to load into it and into a bare one,
    and a bare one's into it; from each, the run goes on with the same bits. If
    ``weights_only=True`` loads the bare one's, it has to load the wrapped one's.
    """
    try:
        saved = Checkpoint.of(Probe(setup, BARE).train_all(range(SAVED_AT)))
        bare = _resumed(setup, BARE, saved, steps, weights_only=saved.is_plain)
    except Exception as error:
        return Finding(f"the bare optimizer cannot be saved and loaded ({brief(error)})"), Finding()
    survived = torch.equal(bare.weights, Probe(setup).train_all(range(steps)).weights)
    found = Finding("" if survived else "the bare optimizer continues otherwise than without saving")
    try:
        ours = Checkpoint.of(Probe(setup, WRAPPED).train_all(range(SAVED_AT)))
    except Exception as error:
        return found, Finding(f"not saved: {brief(error)}")
    return found, Finding(_wrapped(setup, bare, saved, ours, steps))


def _wrapped(setup: Setup, bare: Probe, theirs: Checkpoint, ours: Checkpoint, steps: int) -> str:
    ways = {
        "saved and loaded": (WRAPPED, ours),
        "its checkpoint in the bare optimizer": (BARE, ours),
        "with the bare optimizer's checkpoint": (WRAPPED, theirs),
    }
    for way, (options, checkpoint) in ways.items():
        try:
            resumed = _resumed(setup, options, checkpoint, steps, weights_only=theirs.is_plain)
            difference = bare.picture().difference(resumed.picture())
        except Exception as error:
            difference = brief(error)
        if difference:
            return f"{way}: {difference}"
    return ""


def _resumed(
    setup: Setup, options: dict[str, Any] | None, saved: Checkpoint, steps: int, *, weights_only: bool
) -> Probe:
    probe = Probe(setup, options)
    probe.write(saved.weights)
    probe.optimizer.load_state_dict(saved.load(weights_only=weights_only))
    return probe.train_all(range(SAVED_AT, steps))
