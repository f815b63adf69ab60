"""Logs that were torn, filled with garbage, or written to a full disk."""

from __future__ import annotations

import json
import random
import resource
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from step_optim import read_log
from step_optim.telemetry.log import JSONLWriter
from step_optim.telemetry.record import StepRecord
from tests.faults.campaign import Size
from tests.faults.portrait import Portrait
from tests.faults.worlds import build

STEPS = 4
GARBAGE = 600


def _log(scenario: str, folder: Path) -> bytes:
    """The log of a short run."""
    world = build(scenario, folder)
    for step in range(STEPS):
        world.step(step)
    return world.log.read_bytes()


class Logs:
    """A log that is damaged, read, and written on."""

    def __init__(self, scenario: str) -> None:
        self.name = f"log/{scenario}"
        self._scenario = scenario
        self._data = b""

    def cases(self, size: Size, draw: random.Random) -> Iterable[str]:
        """Every length within the last two lines and the first, and garbage of many kinds in many places."""
        lines = [len(line) + 1 for line in self._whole().splitlines()]
        lengths = [*range(lines[0] + 3), *range(sum(lines[:-2]), sum(lines) + 1)]
        cases = [f"cut/{length}" for length in lengths] + [f"garbage/{seed}" for seed in range(GARBAGE)]
        return draw.sample(cases, 150) if size is Size.QUICK else cases

    def _whole(self) -> bytes:
        if not self._data:
            with tempfile.TemporaryDirectory() as folder:
                self._data = _log(self._scenario, Path(folder))
        return self._data

    def run(self, case: str, folder: Path) -> list[str]:
        """Damage the log, read it, write on, read it again."""
        path = folder / "damaged.jsonl"
        kind, number = case.split("/")
        whole = self._whole()
        path.write_bytes(whole)
        records = read_log(path)
        if kind == "cut":
            path.write_bytes(whole[: int(number)])
            return list(_torn(path, records, whole[: int(number)]))
        path.write_bytes(_garbled(whole, random.Random(int(number))))
        return list(_garbage(path))


def _torn(path: Path, records: list[StepRecord], data: bytes) -> Iterator[str]:
    """All whole lines are read, and kept when the log is written on."""
    whole = [_plain(record) for record in records]
    lines = [line for line in data.split(b"\n") if _is_json(line)]
    read = [_plain(record) for record in read_log(path)]
    if read != whole[: max(len(lines) - 1, 0)]:  # one line is the header
        yield f"read {len(read)} records of {len(lines)} lines"
    for record in (records[-1], records[-1]):
        JSONLWriter(path, lambda: {"who": "resumed"})(record)
    if not all(_is_json(line) for line in path.read_bytes().splitlines()):
        yield "a line is glued or torn"
    if not path.read_bytes().startswith(b"\n".join(lines)):
        yield "a whole line was lost"
    if [_plain(record) for record in read_log(path)] != [*whole[: min(len(read), STEPS - 1)], whole[-1]]:
        yield "the log does not read as one run"


def _garbage(path: Path) -> Iterator[str]:
    """It is refused by name and with nothing changed, or read; what is written on it is there."""
    data = path.read_bytes()
    readable = True
    try:
        records = read_log(path)
        record = records[-1] if records else None
    except ValueError as error:
        readable, record = False, None
        if str(path) not in str(error):
            yield f"the error does not name the log: {error}"
    if path.read_bytes() != data:
        yield "reading has changed it"
    try:
        writer = JSONLWriter(path, dict)
    except ValueError as error:
        if path.read_bytes() != data or str(path) not in str(error):
            yield f"it was refused, but: {error}"
        return
    if record is not None:
        writer(record)
        if not path.read_bytes().startswith(data[: data.rfind(b"\n") + 1]):
            yield "earlier lines have changed"
        if readable and _plain(read_log(path)[-1]) != _plain(record):
            yield "what was written is not read"


def _garbled(data: bytes, draw: random.Random) -> bytes:
    """Overwrite, insert, delete or repeat something."""
    start = draw.randrange(len(data))
    stop = min(start + draw.choice([1, 1, 3, 40, 900]), len(data))
    noise = draw.choice(
        [draw.randbytes(stop - start), b"\x00" * (stop - start), b"[" * 5000, b"{}\n", b"\n", b'"', b""]
    )
    middle = draw.choice([noise, noise + data[start:stop], data[start:stop] * 2])
    return data[:start] + middle + data[stop:]


def _plain(record: StepRecord) -> str:
    return json.dumps(record.to_dict(), sort_keys=True)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


class FullDisk:
    """A disk that has room for a part of a record only."""

    def __init__(self, scenario: str) -> None:
        self.name = f"disk/{scenario}"
        self._scenario = scenario

    def cases(self, size: Size, draw: random.Random) -> Iterable[str]:
        """Room for so many bytes, before the first record and before a later one."""
        rooms = [f"{step}/{room}" for step in (0, 2) for room in range(0, 900, 9)]
        return draw.sample(rooms, 6) if size is Size.QUICK else rooms

    def run(self, case: str, folder: Path) -> list[str]:
        """Make one step on the full disk: it stands, its error is raised, and the log goes on afterwards."""
        hit, room = map(int, case.split("/"))
        whole = build(self._scenario, folder / "whole")
        for step in range(STEPS):
            whole.step(step)
        world, problems = build(self._scenario, folder / "hit"), []
        lost = False
        for step in range(STEPS):
            world.prepare(step)
            if step != hit:
                world.act(step)
                continue
            size = world.log.stat().st_size if world.log.exists() else 0
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
            try:
                world.act(step)
            except OSError:
                lost = True
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            if len(read_log(world.log)) != step + (not lost):
                problems.append("the log is not readable right after it")
        if Portrait(world).differences(Portrait(whole)):
            problems.append("the run was disturbed")
        steps = [record.step for record in read_log(world.log)]
        if steps != [step for step in range(STEPS) if step != hit or not lost]:
            problems.append(f"the log has the steps {steps}")
        if not all(_is_json(line) for line in world.log.read_bytes().splitlines()):
            problems.append("a line is glued or torn")
        return problems
