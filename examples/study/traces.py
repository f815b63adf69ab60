"""Runs as they are kept: one JSON line each, figures to six digits, in one compressed file."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_optim import StepRecord

DIGITS = 6


@dataclass(frozen=True)
class Run:
    """One finished run. KL in nats per token."""

    arm: str
    condition: str
    seed: int
    records: tuple[StepRecord, ...]
    """one for each update, in order: movement on the control set, decisions, training reward"""
    updates: tuple[Mapping[str, Any], ...]
    """what is no step record, one for each update:

    - ``t``, ``shock`` (whether the learning rate was multiplied),
    - ``held``: {"mean", "slices"}, movement of what was committed, on held-out prompts (zeros after a rejection),
    - ``held_drift``: mean movement from the first policy on held-out prompts,
    - ``seconds``: of the whole update without what only the study wants to know (held-out audits),
    - ``minibatches`` that were trained on, ``sampled_kl`` (PPO's estimate, of the last one), ``beta``,
    - ``reference``: "kept", "moved" or "held" (a ratchet that its cap stopped)
    """
    result: Mapping[str, Any]
    """of the first and the last policy, on held-out prompts:

    - ``reward_before``, ``reward``, and by slice ``reward_slices_before``, ``reward_slices``,
    - ``nll_before``, ``nll``: of base text (what the first policy said to the held-out prompts) [nats per token],
    - ``drift``: {"mean", "slices"} from the first policy, held-out; ``control_drift`` the same on the control set,
    - ``seconds``: of all its updates, without scoring and held-out audits; ``device``
    """

    @property
    def name(self) -> str:
        """Arm, condition and seed, for messages."""
        return f"{self.arm}/{self.condition}/{self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        head = {"arm": self.arm, "condition": self.condition, "seed": self.seed}
        rounded = shortened(
            {"records": [record.to_dict() for record in self.records], "updates": self.updates, "result": self.result}
        )
        return head | rounded

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Run:
        """Read what `to_dict` returned."""
        records = tuple(StepRecord.from_dict(record) for record in plain["records"])
        updates, result = tuple(lengthened(plain["updates"])), lengthened(plain["result"])
        return cls(plain["arm"], plain["condition"], plain["seed"], records, updates, result)


NOT_FINITE = ("nan", "inf", "-inf")
"""How such floats are written: JSON has none."""


def shortened(value: Any) -> Any:
    """Round every float to `DIGITS` significant digits; those that are not finite become texts.

    >>> shortened({"kl": [0.123456789, 3, math.inf]})
    {'kl': [0.123457, 3, 'inf']}
    """
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {name: shortened(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [shortened(part) for part in value]
    return value


def lengthened(value: Any) -> Any:
    """Read what `shortened` wrote.

    >>> lengthened({"kl": ["inf", 1.5, "held"]})
    {'kl': [inf, 1.5, 'held']}
    """
    if isinstance(value, Mapping):
        return {name: lengthened(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [lengthened(part) for part in value]
    return float(value) if value in NOT_FINITE else value


def save(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write plain values, one JSON line each; equal values give equal bytes."""
    text = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def load(path: Path) -> list[dict[str, Any]]:
    """Read what `save` wrote."""
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def save_runs(path: Path, runs: Iterable[Run]) -> None:
    """Write runs, ordered by arm, condition and seed."""
    save(path, (run.to_dict() for run in sorted(runs, key=lambda run: (run.arm, run.condition, run.seed))))


def load_runs(path: Path) -> list[Run]:
    """Read runs."""
    return [Run.from_dict(line) for line in load(path)]
