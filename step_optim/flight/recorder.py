"""A flight recorder: the steps that would have moved the policy farthest, on disk, in bounded space."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

from torch import Tensor
from torch.optim import Optimizer

from step_optim.budget import Budget
from step_optim.controllers.base import Action
from step_optim.flight.kept import KeptStep, file_name, packed, read_kept, step_of
from step_optim.host.files import PARTIAL, check_writable, write_whole
from step_optim.host.paths import user_path
from step_optim.limits import Limits
from step_optim.snapshot.snapshot import Snapshot
from step_optim.snapshot.tensors import shard_count
from step_optim.telemetry.record import StepRecord

KEEP, WHEN = ("largest", "latest"), ("triggered", "always")


class _File(NamedTuple):
    step: int
    path: Path
    size: int
    written: int
    """Of a file's status: when, in nanoseconds."""


class FlightRecorder:
    """Keeps steps on disk, one file a step: the record, theta_t and the candidate.

    The delta is candidate - theta_t. Both ends are kept because theta_t + delta
    would be rounded. A file is written after the step was decided, and gets
    its name when all of it is written. If the disk is full, ``step()`` raises
    that error, and the step is complete all the same.

    One folder is for one optimizer. A run that begins at a step which the
    folder has already, because it was resumed or is another one, moves what
    the folder has of that step and of later ones to ``earlier-1`` in there
    (``earlier-2``, ...), with a warning. These, and files of other names, do
    not count, and are left alone. Under torch.distributed the first process
    writes; weights that FSDP2 has split are refused.

    Args:
        folder: where; it is made if it is not there.
        max_bytes: what all kept steps may take together. Room is made before a step is written. A step that is
            larger by itself is not kept, and warned of once.
        keep: ``"largest"``: the latest step, and of the others those that went farthest beyond their budgets, see
            `severity`. ``"latest"``: the latest ones.
        when: which steps: ``"triggered"``, those over budget; or ``"always"``, all that moved a weight.

    Raises:
        TypeError: a folder or a number of another kind.
        ValueError: an unknown word, no positive number, a folder that is a file.

    >>> import tempfile
    >>> FlightRecorder(tempfile.mkdtemp(), max_bytes=10_000).latest is None
    True
    """

    def __init__(
        self, folder: str | Path, *, max_bytes: int = 1_000_000_000, keep: str = "largest", when: str = "triggered"
    ) -> None:
        if not isinstance(folder, (str, Path)) or not str(folder):
            raise TypeError(f"folder={folder!r} is no path of a folder; give one like 'runs/flight'")
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise TypeError(f"max_bytes={max_bytes!r} is no whole number; give bytes, 1_000_000_000 say")
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes} keeps nothing; give a number of bytes above 0")
        if keep not in KEEP:
            raise ValueError(f"keep={keep!r} is unknown; use 'largest' or 'latest'")
        if when not in WHEN:
            raise ValueError(f"when={when!r} is unknown; use 'triggered' or 'always'")
        self.folder, self.max_bytes, self.keep, self.when = user_path(folder).absolute(), max_bytes, keep, when
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"folder={str(folder)!r} is a file; give the path of a folder")
        check_writable(self.folder, f"folder={str(folder)!r}")
        self._seen: int | None = None
        """The latest step that has ended."""
        self._ranks: dict[_File, tuple[bool, float, int]] = {}
        self._warned: set[str] = set()
        """What was warned of."""
        self._known: set[str] | None = None
        """Names of the files that there are of ours; None before the first write."""
        self._owner: ReferenceType[Optimizer] | None = None
        """The inner optimizer whose steps it keeps."""

    @property
    def latest(self) -> KeptStep | None:
        """The latest kept step; None before the first."""
        files = self._files()
        return read_kept(max(files).path) if files else None

    def take(self, record: StepRecord, snapshot: Snapshot, names: Callable[[], Mapping[str, int | None]]) -> None:
        """Keep a step, if it is one of those to keep. The step calls this when it was decided.

        Args:
            record: its record.
            snapshot: has both of its ends.
            names: tells where named parameters are in the snapshot.

        Raises:
            OSError: the file cannot be written.
            ValueError: the weights are in pieces.
        """
        self._set_repeated_aside(record.step)
        if not self._selects(record):
            return
        check_whole(snapshot.parameters)
        size = 2 * sum(parameter.numel() * parameter.element_size() for parameter in snapshot.parameters)
        if size <= self.max_bytes:
            data = packed(record, names(), snapshot.way, snapshot.proposal(), snapshot.spared)
            size = len(data)
        if size > self.max_bytes:
            self._warn_of_size(record.step, size)
            return
        self._make_room(size)
        self._known = {file.path.name for file in self._files()} | {file_name(record.step)}
        write_whole(self.folder / file_name(record.step), data)

    def _selects(self, record: StepRecord) -> bool:
        return record.action is not Action.UNCHANGED and (self.when == "always" or record.triggered)

    def _set_repeated_aside(self, step: int) -> None:
        """Move away what a run left that went this way before: it was resumed, its state was loaded, or is another."""
        if self._seen is None or step != self._seen + 1:
            repeated = [file for file in self._files() if file.step >= step]
            if repeated:
                aside = next(
                    self.folder / f"earlier-{n}" for n in count(1) if not (self.folder / f"earlier-{n}").exists()
                )
                aside.mkdir()
                for file in repeated:
                    file.path.rename(aside / file.path.name)
                warnings.warn(
                    f"{self.folder} had {len(repeated)} kept steps from step {step} on, of a run that went this way "
                    f"before; they are in {aside.name} now. Delete that if you do not need it",
                    stacklevel=2,
                )
        self._seen = step

    def _tell_of_others(self, files: Iterable[_File]) -> None:
        """Warn of files that somebody else has written since the latest of ours."""
        others = set() if self._known is None else {file.path.name for file in files} - self._known
        if others and "others" not in self._warned:
            self._warned.add("others")
            warnings.warn(
                f"another optimizer writes into {self.folder}, too ({min(others)}): their steps replace each other. "
                "Give each optimizer a folder of its own",
                stacklevel=2,
            )

    def _make_room(self, size: int) -> None:
        """Drop the least of the kept steps until there is room for one more file."""
        for partial in self.folder.glob(f"step_*.pt{PARTIAL}"):  # of a process that was killed
            partial.unlink(missing_ok=True)
        files = self._files()
        self._tell_of_others(files)
        self._ranks = {file: rank for file, rank in self._ranks.items() if file in files}
        files.sort(key=self._rank if self.keep == "largest" else None)
        free = self.max_bytes - size - sum(file.size for file in files)
        for file in files:
            if free >= 0:
                break
            file.path.unlink(missing_ok=True)
            free += file.size

    def _files(self) -> list[_File]:
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if (step := step_of(path.name)) is not None:
                status = path.stat()
                found.append(_File(step, path, status.st_size, status.st_mtime_ns))
        return found

    def _rank(self, file: _File) -> tuple[bool, float, int]:
        """What makes one kept step more worth keeping than another; a file that cannot be read goes first."""
        if file not in self._ranks:
            try:
                self._ranks[file] = *severity(read_kept(file.path).record), file.step
            except ValueError:
                self._ranks[file] = False, -1.0, file.step
        return self._ranks[file]

    def _warn_of_size(self, step: int, size: int) -> None:
        if "size" not in self._warned:
            self._warned.add("size")
            warnings.warn(
                f"step {step} takes {size:,} bytes, more than max_bytes={self.max_bytes:,}: the flight recorder does "
                f"not keep steps of this size. Give FlightRecorder(max_bytes={10 * size:_}) for about ten of them, or "
                "train fewer weights (LoRA)",
                stacklevel=2,
            )

    def claim(self, optimizer: Optimizer) -> None:
        """Keep the steps of this inner optimizer.

        Raises:
            ValueError: it keeps those of another one.
        """
        if self._owner is not None and self._owner() not in (None, optimizer):
            gc.collect()  # it may be one that nobody holds any more
        if self._owner is not None and self._owner() not in (None, optimizer):
            raise ValueError(
                f"recorder={self!r} keeps the steps of another optimizer; make one for each, in a folder each"
            )
        self._owner = ref(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of another optimizer."""
        return {**vars(self), "_owner": None}

    def __repr__(self) -> str:
        options = f"max_bytes={self.max_bytes}, keep={self.keep!r}, when={self.when!r}"
        return f"FlightRecorder({str(self.folder)!r}, {options})"


def severity(record: StepRecord) -> tuple[bool, float]:
    """Tell how far a candidate went: whether it was not finite, and its largest KL / budget over all constraints.

    Without a finite budget it is the largest KL. Where upper confidence bounds
    were held against the budgets, they are taken.

    >>> from step_optim.limits import Limits
    >>> from step_optim.movement import Movement
    >>> severity(StepRecord(0, Action.SHRINK, Movement(0.06), Movement(0.03), Limits(mean=0.03)))
    (False, 2.0)
    """
    drift = record.candidate_drift
    if not record.candidate.is_finite or (drift is not None and not drift.is_finite):
        return True, math.inf
    limits = replace(_as_set(record.budget), confidence=None)
    if drift is None:
        limits = limits.without_caps()
    ratios = dict(limits.judge(record.candidate, drift).ratios)
    for name, bound in record.candidate_bounds.items():
        limit = limits.of(name)
        if name in ratios and limit > 0:
            ratios[name] = bound / limit
    return False, max(ratios.values(), default=record.candidate.largest)


def _as_set(limits: Limits) -> Limits:
    """The caps on the path in the place of what they had left: of one that is used up any step would be beyond all."""
    slices = {
        name: limits.path_slices[name] if f"slice:{name}" in limits.lowered else limit
        for name, limit in limits.slices.items()
    }
    return replace(limits, mean=limits.path if "mean" in limits.lowered else limits.mean, slices=slices)


def check_whole(parameters: Iterable[Tensor]) -> None:
    """Refuse weights of which this process has a part only.

    Raises:
        ValueError: one is.
    """
    if any(shard_count(parameter) > 1 for parameter in parameters):
        raise ValueError(
            "recorder= keeps whole weights, and some of these are split over processes (FSDP2): no process has both "
            "ends of a step. Use DistributedDataParallel, or recorder=None"
        )


def recorder_of(recorder: Any, optimizer: Optimizer, budget: Budget) -> FlightRecorder | None:
    """Read the argument ``recorder=``: None, a `FlightRecorder`, or the path of its folder.

    Raises:
        TypeError: none of these.
        ValueError: weights that are in pieces; a recorder of another optimizer.
    """
    if recorder is None:
        return None
    if isinstance(recorder, (str, Path)):
        recorder = FlightRecorder(recorder)
    if not isinstance(recorder, FlightRecorder):
        raise TypeError(f"recorder={recorder!r} is no FlightRecorder; give FlightRecorder(folder), a path, or None")
    check_whole(p for group in optimizer.param_groups for p in group["params"])
    recorder.claim(optimizer)
    if recorder.when == "triggered" and not budget.limits_anything:
        warnings.warn(
            f"{recorder!r} keeps steps over budget, and under {budget!r} there are none; use when='always'",
            stacklevel=3,
        )
    return recorder
