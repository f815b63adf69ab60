"""The file of a ledger: what it holds, read and written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from step_optim.host.files import write_whole
from step_optim.path_length import PathLength
from step_optim.telemetry.record import jsonable

SCHEMA = 1
"""Version of the file's format."""

ORIGINS = ("first", "own")
"""What displacement is measured from: the policy at the start of the first stage, or whatever the stage itself has."""


@dataclass(frozen=True)
class Stage:
    """What one stage of training has done so far. KL figures are in nats per token."""

    stage: str
    """Its name."""
    steps: int = 0
    """Steps that were decided; rejected ones count."""
    path: float = 0.0
    """Sum of K_global over its committed steps."""
    path_slices: Mapping[str, float] = field(default_factory=dict)
    """Sum of K_s, by slice."""
    displacement: float | None = None
    """KL of its latest policy from pi_ref; None if the KL closure does not measure it."""
    displacement_slices: Mapping[str, float] = field(default_factory=dict)
    """The same by slice."""
    origin: str = "first"
    """Whose start pi_ref is: that of the ``"first"`` stage, or the stage's ``"own"``."""
    began: str = ""
    """When its first step was decided, ISO 8601 in UTC."""
    ended: str = ""
    """When its latest step was."""
    budget: str = ""
    """The budget of the steps to come."""

    @property
    def length(self) -> PathLength:
        """Its path length."""
        return PathLength(self.path, self.path_slices)

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> Stage:
        """Read what stands in a file; fields of newer versions are ignored.

        Raises:
            ValueError: a figure that cannot be.
        """
        known = {each.name: plain[each.name] for each in fields(cls) if each.name in plain}
        for name, read in (("path_slices", _length_of), ("displacement_slices", _kl_of)):
            known[name] = {slice_: read(kl, f"{name}[{slice_!r}]") for slice_, kl in plain[name].items()}
        known["path"] = _length_of(plain["path"], "path")
        if plain["displacement"] is not None:
            known["displacement"] = _kl_of(plain["displacement"], "displacement")
        steps, name, origin = plain["steps"], plain["stage"], plain.get("origin", "first")
        if type(steps) is not int or steps < 0:
            raise ValueError(f"steps={steps!r} is no count")
        if not isinstance(name, str) or not name:
            raise ValueError(f"stage={name!r} is no name")
        if origin not in ORIGINS:
            raise ValueError(f"origin={origin!r} is none of {ORIGINS}")
        return cls(**known)


def _stage(plain: Any) -> Stage:
    """Read an entry; what is wrong in it is told with it."""
    try:
        return Stage.read(plain)
    except LookupError as error:
        raise ValueError(f"{error} is missing in the entry {plain!r:.60}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{error}, in the entry {plain!r:.60}") from error


def _length_of(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{what}={value!r} is no sum of KLs")
    return float(value)


def _kl_of(value: Any, what: str) -> float:
    return math.inf if value == "Infinity" else _length_of(value, what)


def read_ledger(path: Path) -> tuple[str | None, tuple[Stage, ...]]:
    """Return what tells a ledger from others, and its stages; None and none if there is no file.

    Raises:
        ValueError: it is another file, or of a newer version, or was damaged.
    """
    if not path.exists():
        return None, ()
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if (schema := plain["step_optim_ledger"]) > SCHEMA:
            raise ValueError(f"it has schema {schema}, this version reads up to {SCHEMA}; upgrade")
        if not isinstance(plain["stages"], list):
            raise ValueError("its stages are no list")
        stages = tuple(map(_stage, plain["stages"]))
        names = [stage.stage for stage in stages]
        if len({*names}) < len(names):
            raise ValueError(f"two of its stages have one name: {names}")
        return str(plain["id"]), stages
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as a ledger ({type(error).__name__}: {error}); choose another path, or repair it. "
            "Deleting it, with its .pi_ref.pt, forgets the path so far"
        ) from error


def write_ledger(path: Path, name: str, stages: Sequence[Stage]) -> str:
    """Write a ledger's file, whole or not at all, and return what stands in it.

    Args:
        path: of the file.
        name: what tells the ledger from others.
        stages: in order.
    """
    plain = {"step_optim_ledger": SCHEMA, "id": name, "stages": [jsonable(vars(stage)) for stage in stages]}
    text = json.dumps(plain, allow_nan=False)
    write_whole(path, text.encode())
    return text


def policy_file(path: Path, rank: int | None = None) -> Path:
    """Return where pi_ref is, beside a ledger; of a process with prompts of its own, if it is not the first.

    >>> policy_file(Path("ledger.json")).name, policy_file(Path("ledger.json"), 1).name
    ('ledger.pi_ref.pt', 'ledger.pi_ref.1.pt')
    """
    return path.with_name(f"{path.stem}.pi_ref{f'.{rank}' if rank else ''}.pt")


def policies(path: Path) -> list[Path]:
    """Return all such files that are there."""
    name = re.compile(rf"{re.escape(path.stem)}\.pi_ref(\.\d+)?\.pt")
    return [other for other in path.parent.iterdir() if name.fullmatch(other.name)]
