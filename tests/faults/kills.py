"""A run with checkpoints that is killed between two writes, or in the middle of one, and resumed."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from step_optim import read_log
from step_optim.telemetry import log as telemetry
from tests.faults.campaign import Size
from tests.faults.worlds import World, build
from tests.strategies import bits

STEPS = 5


class Disk:
    """Every change of a file goes through here, and the n-th one can be the last thing that a process does."""

    def __init__(self, kill: int | None = None) -> None:
        self.changes, self._kill = 0, kill

    def __call__(self, change: Callable[[], Any]) -> None:
        self._here()
        change()

    def _here(self) -> None:
        if self.changes == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)
        self.changes += 1

    def append(self, file: io.FileIO, data: bytes) -> None:
        """Write in two parts, and be killed before, between, or after them."""
        half = len(data) // 2
        self(lambda: file.write(data[:half]))
        self(lambda: file.write(data[half:]))
        self._here()

    def replace(self, path: Path, data: bytes) -> None:
        """Write a file so that it is whole at every moment: aside, to the disk, and over the old one."""
        aside = path.with_suffix(".new")
        with aside.open("wb", buffering=0) as file:
            self.append(file, data)
            self(lambda: os.fsync(file.fileno()))
        self(lambda: os.replace(aside, path))
        self._here()


def train(scenario: str, folder: Path, disk: Disk) -> World:
    """Train, from the checkpoint if there is one, with a checkpoint after every step."""
    world, latest, first = build(scenario, folder, fresh=False), folder / "latest.pt", 0
    if latest.exists():
        saved = torch.load(latest, weights_only=True)
        world.problem.model.load_state_dict(saved["model"])
        world.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        first = saved["step"]
    for step in range(first, STEPS):
        world.step(step)
        file = io.BytesIO()
        torch.save({"step": step + 1, **_state(world)}, file)
        disk.replace(latest, file.getvalue())
    return world


def _state(world: World) -> dict[str, Any]:
    model, optimizer = world.problem.model.state_dict(), world.optimizer.state_dict()
    return {"model": dict(model), "optimizer": optimizer, "rng": torch.get_rng_state()}


def _outcome(scenario: str, folder: Path, disk: Disk) -> dict[str, Any]:
    with mock.patch.object(telemetry, "_append", disk.append):
        world = train(scenario, folder, disk)
    state = _state(world)
    own = state["optimizer"].pop("step_optim")
    own["summary"] = {name: value for name, value in own["summary"].items() if "seconds" not in name}
    return {"bits": repr([bits(state), bits(own)]), "log": _log(folder), "changes": disk.changes}


def _log(folder: Path) -> list[Any]:
    path = folder / "run.jsonl"
    records = read_log(path) if path.exists() else []
    return [{**record.to_dict(), "seconds": None} for record in records]


def in_a_child(work: Callable[[], Any], result: Path) -> int:
    """Do something in a fork of this process and save what it returns; how the process ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other threads of this process have no part in it
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a fork has none of the threads that its parent would share the work with
            torch.save(work(), result)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Kills:
    """A scenario whose optimizer is all in its checkpoint, killed once or twice."""

    def __init__(self, scenario: str) -> None:
        self.name = f"kill/{scenario}"
        self._scenario = scenario
        self._whole: dict[str, Any] = {}

    def cases(self, size: Size, draw: random.Random) -> Iterable[str]:
        """At every change of a file, and for each of these once more in the resumed run."""
        changes = range(self._undisturbed()["changes"])
        cases = [str(change) for change in changes]
        cases += [f"{change}/{draw.randrange(8)}" for change in changes]
        return draw.sample(cases, 3) if size is Size.QUICK else cases

    def _undisturbed(self) -> dict[str, Any]:
        if not self._whole:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                # In a child, as those that are killed: with more threads, sums may be rounded in another way.
                status = in_a_child(lambda: _outcome(self._scenario, folder, Disk()), folder / "end")
                assert status == 0, f"the undisturbed run ended with status {status}"
                self._whole = torch.load(folder / "end", weights_only=True)
        return self._whole

    def run(self, case: str, folder: Path) -> list[str]:
        """Kill it, perhaps twice; the resumed run ends at the same bits with the same log."""
        folder = folder / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return list(self._problems([*map(int, case.split("/"))], folder))

    def _problems(self, kills: list[int], folder: Path) -> Iterator[str]:
        whole = self._undisturbed()
        for kill in kills:
            status = in_a_child(lambda kill=kill: _outcome(self._scenario, folder, Disk(kill)), folder / "end")
            if status == 0:  # the resumed run was over before that
                break
            if status != -signal.SIGKILL:
                yield f"the run ended with status {status}"
            latest = folder / "latest.pt"
            saved = torch.load(latest, weights_only=True)["step"] if latest.exists() else 0
            log = _log(folder)
            if len(log) not in (saved, saved + 1) or log != whole["log"][: len(log)]:
                yield f"{saved} steps were saved, but {len(log)} are in the log"
        status = in_a_child(lambda: _outcome(self._scenario, folder, Disk()), folder / "end")
        if status != 0:
            yield f"the resumed run ended with status {status}"
            return
        end = torch.load(folder / "end", weights_only=True)
        if end["bits"] != whole["bits"]:
            yield "the resumed run ends elsewhere"
        if end["log"] != whole["log"]:
            yield "the log of the resumed run is another one"
