"""Logs: a record of every step as JSON lines, written and read."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from step_optim.host.paths import user_path
from step_optim.telemetry.record import StepRecord, jsonable
from step_optim.telemetry.sinks import Sink
from step_optim.telemetry.trackers import takes, tracker_sink

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

T = TypeVar("T")
LOGGER = logging.getLogger("step_optim")


def _fast(line: str) -> Any:
    """Read a line for its figures: orjson is three times as fast, and json reads what it does not take."""
    if orjson is not None:
        try:
            return orjson.loads(line)
        except ValueError:
            pass
    return json.loads(line)


SCHEMA = 1
"""Version of the log format; it stands in the first line of every segment."""


_FIRST = b'{"step_optim"'


class JSONLWriter:
    """Appends one JSON object a line. Every record is one write of a whole line: a killed run loses the step in flight.

    A write that is interrupted or fails (a full disk) may leave a torn last
    line. Readers leave it out, and the next write cuts it off first; if it
    lacks nothing but its end, it is kept. A new writer on an existing log
    starts a new segment (a resumed run). Any other existing file is refused.
    """

    def __init__(self, path: str | Path, header: Callable[[], Mapping[str, Any]]) -> None:
        self.path = user_path(path).absolute()  # the process may go elsewhere
        self._header = header
        self._begun = False
        self._end: int | None = None
        """Of the file, where this writer left it; None before the first write, and after one that failed."""
        self._told = False
        """Whether it was told that another writer goes on from there."""
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
            shared = self._end is not None and file.seek(0, os.SEEK_END) > self._end
            self._end = None
            _mend(file)
            if not self._begun or file.seek(0, os.SEEK_END) == 0:
                lines = _line({"step_optim": SCHEMA, **self._header()}) + lines
            _append(file, lines)
            self._end = file.tell()
        self._begun = True
        if shared and not self._told:
            self._told = True
            warnings.warn(
                f"{self.path} is written by another optimizer, too: readers take its steps for those of a resumed run, "
                "and leave out what they replace. Give each optimizer a log of its own",
                stacklevel=2,
            )


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(jsonable(value), allow_nan=False) + "\n").encode()


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
    if parsed(data[start:].decode(errors="replace")) is None:
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
    """Read the argument ``log=``: None, a path, a tracker, a callable(dict, step), or a list of these.

    Args:
        log: that argument. A tracker (see `tracker_sink`) gets flat scalars, a
            callable the whole record; one that takes no step gets none.
        header: makes the first line of a file.
        first: whether this process writes files and trackers, if there are several. Functions are called in each.

    Raises:
        TypeError: none of these, or a callable that needs other arguments.
        ValueError: a path that is no file; a list with a list, or with one thing twice.
    """
    if log is None:
        return lambda record: None
    if isinstance(log, (list, tuple)):
        _check_several(log)
        return _Several([open_log(each, header, first) for each in log])
    if isinstance(log, (str, Path)):
        if not str(log) or user_path(log).is_dir():
            raise ValueError(f"log={str(log)!r} is no file; give a path like 'runs/step.jsonl', or None for no log")
        return _FirstWriter(partial(JSONLWriter, log, header), first)
    tracker = tracker_sink(log)
    if tracker is not None:
        return _first_alone(tracker, first)
    if callable(log):
        return _function_sink(log)
    raise TypeError(
        f"log={log!r} is neither a path, nor a callable(dict, step), nor a tracker with log(dict, step=), nor a list "
        "of these"
    )


def _check_several(logs: Sequence[Any]) -> None:
    if any(isinstance(log, (list, tuple)) for log in logs):
        raise ValueError(f"log={logs!r:.200} has a list in it; give one list of all logs")
    places = [user_path(log).absolute() if isinstance(log, (str, Path)) else log for log in logs]
    for i, place in enumerate(places):
        if any(place is other or (isinstance(place, Path) and place == other) for other in places[:i]):
            raise ValueError(f"log={logs!r:.200} has {logs[i]!r:.100} twice; every record would be written twice")


def _first_alone(sink: Sink, first: Callable[[], bool]) -> Sink:
    def write(record: StepRecord) -> None:
        if first():
            sink(record)

    return write


class _Several:
    """Gives a record to each of several logs, also if one of them fails; then the first failure is raised."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def __call__(self, record: StepRecord) -> None:
        failures: list[Exception] = []
        for sink in self._sinks:
            try:
                sink(record)
            except Exception as failure:
                failures.append(failure)
        if failures:
            for further in failures[1:]:
                LOGGER.error("step %d: a further log failed", record.step, exc_info=further)
            raise failures[0]


def picklable(log: Any) -> Any:
    """What a copy of the optimizer goes on logging to: paths, alone or in a list; None if there are none."""
    if isinstance(log, (list, tuple)):
        return [path for path in log if isinstance(path, (str, Path))] or None
    return log if isinstance(log, (str, Path)) else None


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

    A resumed run, or one whose state was loaded, repeats the steps after its
    checkpoint: what comes later replaces them. A torn last line is left out.

    Raises:
        ValueError: a line that cannot be read, other than a torn last one; or a newer schema.
    """
    header: Mapping[str, Any] = {}
    records: dict[int, StepRecord] = {}
    latest = -1
    for segment, record in read_lines(path, StepRecord.from_dict):
        if record is None:
            header = segment
            continue
        if record.step <= latest:
            records = {step: old for step, old in records.items() if step < record.step}
        records[record.step], latest = record, record.step
    return Trace(header, tuple(records.values()))


Line: TypeAlias = "tuple[Mapping[str, Any], T | None]"
"""The header of a segment and None, or an empty one and what was made of a record."""


def read_lines(path: str | Path, read: Callable[[Mapping[str, Any]], T], *, fast: bool = False) -> Iterator[Line[T]]:
    """Yield what stands in a log, line by line.

    A step that is not beyond the one before repeats what a resumed run had
    logged already: it replaces that, and all that came after.

    Args:
        path: of the log.
        read: makes something of the record of a step.
        fast: read floats alone exactly; of whole numbers beyond 64 bits perhaps the nearest float.

    Raises:
        ValueError: as `read_trace`.
    """
    with user_path(path).open(encoding="utf-8", errors="replace", newline="\n") as file:
        yield from read_each(file, path, read, loads=_fast if fast else json.loads)


def read_each(
    lines: Iterable[str],
    path: str | Path,
    read: Callable[[Mapping[str, Any]], T],
    *,
    first: int = 1,
    loads: Callable[[str], Any] = json.loads,
) -> Iterator[Line[T]]:
    """Yield what stands in some lines of a log; see `read_lines`. The number of the first one is for messages."""
    for number, line in enumerate(lines, first):
        plain = parsed(line, loads)
        if plain is None:
            if not line.endswith("\n"):  # torn
                return
            raise ValueError(
                f"{path}, line {number} is no JSON object: {line.rstrip()[:60]!r}; only the last line may be torn"
            )
        if "step_optim" in plain:
            yield checked_header(plain, path), None
            continue
        try:
            record = read(plain)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number} is no record of a step ({type(error).__name__}: {error}): {line[:60]!r}"
            ) from error
        yield {}, record


def checked_header(header: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    """Refuse the first line of a segment of a newer version.

    Raises:
        ValueError: it is.
    """
    schema = header["step_optim"]
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ValueError(f"{path} has schema {schema!r:.60}, this version reads up to {SCHEMA}; upgrade")
    return header


def parsed(line: str, loads: Callable[[str], Any] = json.loads) -> dict[str, Any] | None:
    """Return the object of a line; None if it holds none."""
    try:
        plain = loads(line)
    except (ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) else None


def read_log(path: str | Path) -> list[StepRecord]:
    """Read the records of a log; see `read_trace`.

    >>> import tempfile
    >>> from step_optim.limits import Limits
    >>> from step_optim.controllers import Action
    >>> from step_optim.movement import Movement
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write = JSONLWriter(f"{folder}/run.jsonl", dict)
    ...     write(StepRecord(0, Action.COMMIT, Movement(0.01), Movement(0.01), Limits(mean=0.03)))
    ...     [str(record.action) for record in read_log(f"{folder}/run.jsonl")]
    ['commit']
    """
    return list(read_trace(path).records)
