"""What happened at every step: the record, and its JSON lines."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from step_optim.budget import Limits
from step_optim.controllers.base import Action
from step_optim.host.paths import user_path
from step_optim.movement import Movement
from step_optim.trackers import Sink as Sink
from step_optim.trackers import takes, tracker_sink

SCHEMA = 1
"""Version of the log format; it stands in the first line of every segment."""


@dataclass(frozen=True)
class TrialRecord:
    """One audit of a point that a controller tried."""

    alpha: float | None
    """Where on the line to the candidate; None for weights off it."""
    movement: Movement
    """K_global and K_s there [nats per token]."""
    feasible: bool
    """Whether every budget held there."""


@dataclass(frozen=True)
class StepRecord:
    """Everything about one step. KL figures are in nats per token, times in seconds."""

    step: int
    """Step index t, counted from 0; rejected steps count."""
    action: Action
    """What became of the step: commit, reject, shrink, project or unchanged."""
    candidate: Movement
    """Movement of what the inner optimizer proposed; NaN if the update itself was not finite."""
    accepted: Movement
    """Movement of what was committed: zero after a rejection."""
    budget: Limits
    """The budgets in force."""
    triggered: bool = False
    """Whether the candidate was infeasible, so that the controller acted."""
    bound: str | None = None
    """The constraint with the largest KL / budget at the candidate: mean, slice:<name> or reference."""
    alpha: float | None = None
    """Part of the update that was committed, as asked for: 1 after a commit, 0 after a rejection, None off the line."""
    alpha_realised: float | None = None
    """The part that rounding made of it; differs in low precision."""
    trials: tuple[TrialRecord, ...] = ()
    """Audits beyond the candidate's, in order."""
    stalled: bool = False
    """Whether a gate's patience was used up."""
    projection: Mapping[str, float] = field(default_factory=dict)
    """Of `Project`: residual (mean ‖l - l_candidate‖²), residual_target, residual_interpolation, steps;
    strength_min and strength_max: the smallest and largest lambda of a prompt in the mixture aimed at."""
    reference_drift: Movement | None = None
    """Movement of the committed policy from pi_ref; None if the KL closure does not measure it."""
    update_norm: float = 0.0
    """L2 norm of candidate - previous weights."""
    lr: tuple[float, ...] = ()
    """Learning rate of each parameter group at this step."""
    scale: float = 1.0
    """What the proposal multiplied them by, under ``warm_start``."""
    reference_renewed: bool = False
    """Whether somebody else has written weights since the last step, so that the reference was taken anew."""
    reward: float | None = None
    """From `note(reward=...)`."""
    success: bool = True
    """False if something went wrong (see ``error``); or from `note(success=...)`."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time by phase: inner, snapshot, audit (reference, candidate and drift), search (trials). And elapsed: from the
    end of the step before to the end of this one, with all that the training loop did; not in a process's first."""
    error: str | None = None
    """What went wrong, if something did: an exception, or a candidate that is not finite."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Anything else from `note(...)`."""

    @property
    def constraint(self) -> str | None:
        """What the controller had to deal with: ``bound``, or ``"not finite"``; None if the step was not triggered."""
        if not self.triggered:
            return None
        return "not finite" if self.bound is None or not self.candidate.is_finite else self.bound

    @property
    def audits(self) -> int:
        """How often movement was measured, at the candidate and at trials."""
        return len(self.trials) + (self.action is not Action.UNCHANGED)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; NaN and infinities become the texts "NaN", "Infinity" and "-Infinity"."""
        plain: dict[str, Any] = _jsonable({f.name: getattr(self, f.name) for f in fields(self)})
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> StepRecord:
        """Read what `to_dict` returned; fields of newer versions are ignored."""
        values = {f.name: plain[f.name] for f in fields(cls) if f.name in plain}
        values["step"], values["action"] = int(values["step"]), Action(values["action"])
        values["candidate"], values["accepted"] = (
            _movement(values["candidate"]),
            _movement(values["accepted"]),
        )
        limits = values["budget"]
        values["budget"] = Limits(float(limits["mean"]), _floats(limits["slices"]), float(limits["reference"]))
        values["trials"] = tuple(
            TrialRecord(_float(trial["alpha"]), _movement(trial["movement"]), trial["feasible"])
            for trial in values.get("trials", ())
        )
        drift = values.get("reference_drift")
        values["reference_drift"] = None if drift is None else _movement(drift)
        for name in ("alpha", "alpha_realised", "update_norm", "reward"):
            values[name] = _float(values.get(name))
        values["lr"] = tuple(float(lr) for lr in values.get("lr", ()))
        values["scale"] = float(values.get("scale", 1.0))
        values["projection"], values["seconds"] = _floats(values["projection"]), _floats(values["seconds"])
        return cls(**values)

    def flat(self) -> dict[str, float | str]:
        """Return scalars under slash-separated names, as experiment trackers like them."""
        return dict(_flatten(self.to_dict() | {"trials": len(self.trials)}, "step_optim"))


def _jsonable(value: Any) -> Any:
    if isinstance(value, Action):
        return value.value
    if isinstance(value, Movement):
        return _jsonable(value.to_dict())
    if isinstance(value, (Limits, TrialRecord)):
        return _jsonable({f.name: getattr(value, f.name) for f in fields(value)})
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _movement(plain: Mapping[str, Any]) -> Movement:
    return Movement(float(plain["mean"]), _floats(plain["slices"]))


def _flatten(value: Any, name: str) -> Iterator[tuple[str, float | str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(item, f"{name}/{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _flatten(item, f"{name}/{i}")
    elif value is not None:
        yield name, float(value) if value in ("NaN", "Infinity", "-Infinity") else value


_FIRST = b'{"step_optim"'


class JSONLWriter:
    """Appends one JSON object a line. Every record is one write of a whole line: a killed run loses the step in flight.

    A write that is interrupted or fails (a full disk) may leave a torn last
    line. Readers leave it out, and the next write cuts it off first; if it
    lacks nothing but its end, it is kept. A new writer on an existing log
    starts a new segment (a resumed run). Any other existing file is refused.
    """

    def __init__(self, path: str | Path, header: Callable[[], Mapping[str, Any]]) -> None:
        self.path = user_path(path)
        self._header = header
        self._begun = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as existing:  # a path that cannot be written is refused now, not after a step
            existing.seek(0)
            start = existing.read(len(_FIRST))
        if not _FIRST.startswith(start):  # empty, torn in the very first write, or the header of a log
            raise ValueError(f"log={str(path)!r} exists and is no step_optim log; choose another path")

    def __call__(self, record: StepRecord) -> None:
        """Write one record, after the header of the segment if it is the first."""
        lines = _line(record.to_dict())
        with self.path.open("a+b", buffering=0) as file:
            _mend(file)
            if not self._begun or file.seek(0, os.SEEK_END) == 0:
                lines = _line({"step_optim": SCHEMA, **self._header()}) + lines
            _append(file, lines)
        self._begun = True


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(_jsonable(value), allow_nan=False) + "\n").encode()


def _append(file: FileIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]  # on a disk that fills up, a write may end early; the next one says why


def _mend(file: FileIO) -> None:
    """Cut off a torn last line; end one that is whole."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    data = file.read()
    start = data.rfind(b"\n") + 1
    if _parses(data[start:].decode(errors="replace")) is None:
        file.truncate(start)
    else:
        _append(file, b"\n")


class _FirstWriter:
    """Writes the log in the first process; the others do not touch the file."""

    def __init__(self, open_file: Callable[[], JSONLWriter], first: Callable[[], bool]) -> None:
        self._open, self._first = open_file, first
        self._writer = open_file() if first() else None

    def __call__(self, record: StepRecord) -> None:
        if self._first():
            if self._writer is None:  # the processes are other ones by now
                self._writer = self._open()
            self._writer(record)


def open_log(log: Any, header: Callable[[], Mapping[str, Any]], first: Callable[[], bool] = lambda: True) -> Sink:
    """Read the argument ``log=``: None, a path, a tracker, or a callable(dict, step).

    Args:
        log: that argument. A tracker (see `tracker_sink`) gets flat scalars, a
            callable the whole record; one that takes no step gets none.
        header: makes the first line of a file.
        first: whether this process writes the file, if there are several.

    Raises:
        TypeError: none of these, or a callable that needs other arguments.
        ValueError: a path that is no file.
    """
    if log is None:
        return lambda record: None
    if isinstance(log, (str, Path)):
        if not str(log) or user_path(log).is_dir():
            raise ValueError(f"log={str(log)!r} is no file; give a path like 'runs/step.jsonl', or None for no log")
        return _FirstWriter(partial(JSONLWriter, log, header), first)
    tracker = tracker_sink(log)
    if tracker is not None:
        return tracker
    if callable(log):
        return _function_sink(log)
    raise TypeError(f"log={log!r} is neither a path, nor a callable(dict, step), nor a tracker with log(dict, step=)")


def _function_sink(log: Callable[..., Any]) -> Sink:
    """Give a function the whole record, and the step where it takes one."""
    if takes(log, {}, 0):
        return lambda record: log(record.to_dict(), record.step)
    if takes(log, {}, step=0):
        return lambda record: log(record.to_dict(), step=record.step)
    if takes(log, {}):
        return lambda record: log(record.to_dict())
    raise TypeError(f"log={log!r} cannot be called with (dict, step); give a function of these, or a path")


@dataclass(frozen=True)
class Trace:
    """A log as it was read."""

    header: Mapping[str, Any]
    """Of the latest segment: schema, budget, controller, versions."""
    records: tuple[StepRecord, ...]
    """In step order, each step once."""


def read_trace(path: str | Path) -> Trace:
    """Read a log.

    A resumed run repeats the steps after its checkpoint: the later segment
    replaces them. A torn last line is left out.

    Raises:
        ValueError: a line that cannot be read, other than a torn last one; or a newer schema.
    """
    header: dict[str, Any] = {}
    records: dict[int, StepRecord] = {}
    *lines, torn = user_path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    starting = False
    for number, line in enumerate(lines if _parses(torn) is None else [*lines, torn], 1):
        plain = _parses(line)
        if plain is None:
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:60]!r}; only the last line may be torn")
        if "step_optim" in plain:
            if not isinstance(plain["step_optim"], int) or plain["step_optim"] > SCHEMA:
                raise ValueError(
                    f"{path} has schema {plain['step_optim']!r:.60}, this version reads up to {SCHEMA}; upgrade"
                )
            header, starting = plain, True
            continue
        try:
            record = StepRecord.from_dict(plain)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number} is no record of a step ({type(error).__name__}: {error}): {line[:60]!r}"
            ) from error
        if starting:
            records = {step: old for step, old in records.items() if step < record.step}
            starting = False
        records[record.step] = record
    return Trace(header, tuple(records[step] for step in sorted(records)))


def _parses(line: str) -> dict[str, Any] | None:
    try:
        plain = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) else None


def read_log(path: str | Path) -> list[StepRecord]:
    """Read the records of a log; see `read_trace`."""
    return list(read_trace(path).records)
