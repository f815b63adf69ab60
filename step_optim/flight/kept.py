"""A kept step: one file with its record and the two ends of its update, written whole or not at all."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step_optim.host.paths import user_path
from step_optim.telemetry.record import StepRecord

VERSION = 1
"""Of the file format; it stands in every file under `FORMAT`."""

FORMAT = "step_optim_flight"

_NAME = re.compile(r"step_(\d{8,})\.pt")


@dataclass(frozen=True)
class KeptStep:
    """A step that a `FlightRecorder` has kept. Its tensors are read from the file whenever they are asked for."""

    path: Path
    """Of the file."""
    record: StepRecord = field(repr=False)
    """What the step measured and what became of it; as one that was read from a log."""
    names: Mapping[str, int | None] = field(repr=False, default_factory=dict)
    """Where the model's parameters are in `previous`, by name and in the model's order; None of those that the
    optimizer does not move. Tied parameters are in one place. Empty if no module is known."""
    way: tuple[float, ...] | None = field(repr=False, default=None)
    """How early each tensor arrives at the candidate, where the controller did not go straight; see `snapshot.path`."""
    spared: tuple[int, ...] = field(repr=False, default=())
    """The places of what kept its whole step: it was at the candidate at every point that was tried."""

    @property
    def step(self) -> int:
        """The step index."""
        return self.record.step

    @property
    def ends(self) -> tuple[list[Tensor], list[Tensor]]:
        """`previous` and `candidate`, in one reading."""
        plain = _read(self.path)
        return plain["previous"], plain["candidate"]

    @property
    def previous(self) -> list[Tensor]:
        """theta_t: a tensor on the CPU for each parameter, in the optimizer's order, tied ones once."""
        return self.ends[0]

    @property
    def candidate(self) -> list[Tensor]:
        """What the inner optimizer proposed, in the same order."""
        return self.ends[1]


def file_name(step: int) -> str:
    """Return the name of a step's file.

    >>> file_name(12)
    'step_00000012.pt'
    """
    return f"step_{step:08d}.pt"


def step_of(name: str) -> int | None:
    """Return the step that a file's name says; None of any other file.

    >>> step_of("step_00000012.pt"), step_of("step_00000012.pt.partial"), step_of("model.pt")
    (12, None, None)
    """
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def packed(
    record: StepRecord,
    names: Mapping[str, int | None],
    way: Sequence[float] | None,
    ends: Iterable[tuple[Tensor, Tensor]],
    spared: Sequence[int] = (),
) -> memoryview:
    """Return the bytes of a step's file; for the arguments see `KeptStep`."""
    pairs = [(_on_cpu(previous), _on_cpu(candidate)) for previous, candidate in ends]
    data = io.BytesIO()
    plain = {
        FORMAT: VERSION,
        "record": record.to_dict(),
        "names": dict(names),
        "way": None if way is None else list(way),
        "spared": list(spared),
        "previous": [previous for previous, _ in pairs],
        "candidate": [candidate for _, candidate in pairs],
    }
    torch.save(plain, data)
    return data.getbuffer()


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy of its elements alone: a view would be saved with all the memory that it is a view of."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def read_kept(path: Path) -> KeptStep:
    """Read the record of one kept step.

    Raises:
        ValueError: the file is damaged, of a newer version, or something else.
    """
    plain = _read(path)
    try:
        names = {str(name): None if place is None else int(place) for name, place in plain["names"].items()}
        way = None if plain["way"] is None else tuple(map(float, plain["way"]))
        spared = tuple(map(int, plain.get("spared", ())))
        kept = KeptStep(path, StepRecord.from_dict(plain["record"]), names, way, spared)
        if kept.step != step_of(path.name):
            raise ValueError(f"it holds step {kept.step}")
        _check_ends(plain["previous"], plain["candidate"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(path, error) from error
    return kept


def _check_ends(previous: Any, candidate: Any) -> None:
    kinds = [[(tensor.shape, tensor.dtype) for tensor in tensors] for tensors in (previous, candidate)]
    if kinds[0] != kinds[1]:
        raise ValueError("its two ends are not of the same kind")


def _read(path: Path) -> dict[str, Any]:
    """What is in a file; its tensors stay on the disk until they are looked at."""
    try:
        plain = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is not there any more; read_flight() tells what the folder has now") from error
    except OSError:  # it may not be read, or the disk is broken
        raise
    except Exception as error:  # a file can be damaged in as many ways as torch has errors
        raise _unreadable(path, error) from error
    if not isinstance(plain, dict) or FORMAT not in plain:
        raise _unreadable(path, ValueError(f"it has no entry {FORMAT!r}"))
    if plain[FORMAT] != VERSION:
        raise ValueError(f"{path} is of version {plain[FORMAT]!r:.60}, this step_optim reads {VERSION}; upgrade it")
    return plain


def _unreadable(path: Path, error: Exception) -> ValueError:
    first = str(error).partition("\n")[0]
    return ValueError(
        f"{path} is damaged, or was not written by a FlightRecorder ({type(error).__name__}: {first:.120}); delete it, "
        "or move it out of the folder"
    )


def read_flight(folder: str | Path) -> list[KeptStep]:
    """Read which steps a `FlightRecorder` has kept, in step order; tensors are read when they are asked for.

    Args:
        folder: the recorder's. Files of other names, and what a killed process has not finished, are left out.

    Raises:
        ValueError: it is no folder; a file in it is damaged, of a newer version, or something else.
        OSError: a file may not be read.

    >>> import tempfile
    >>> read_flight(tempfile.mkdtemp())
    []
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is no folder; give the one of FlightRecorder(folder)")
    steps = {path: step for path in folder.iterdir() if (step := step_of(path.name)) is not None}
    return [read_kept(path) for path in sorted(steps, key=steps.__getitem__)]
