"""Checkpoints of which a part is missing, of the wrong type, not finite, or cut off."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.faults.campaign import Size
from tests.faults.portrait import Portrait
from tests.faults.worlds import World, build
from tests.strategies import bits

WRONG: dict[str, Callable[[Any], Any]] = {
    "none": lambda old: None,
    "text": lambda old: "three",
    "list": lambda old: [1, 2],
    "empty": lambda old: {},
    "negative": lambda old: -1,
    "huge": lambda old: 10**400,
    "nan": lambda old: math.nan,
    "inf": lambda old: math.inf,
    "tensor": lambda old: torch.zeros(3, 2),
    "nan inside": lambda old: _nan(old) if isinstance(old, Tensor) else math.nan,
    "other shape": lambda old: old[:-1].clone() if isinstance(old, Tensor) and old.dim() else (1, 2, 3),
}
SAVED = 2
"""Steps before the checkpoint."""


class Checkpoints:
    """A checkpoint whose part of step_optim is damaged, loaded into a run that is under way."""

    def __init__(self, scenario: str) -> None:
        self.name = f"checkpoint/{scenario}"
        self._scenario = scenario

    def cases(self, size: Size, draw: random.Random) -> Iterable[str]:
        """Every entry of any depth missing or wrong in all ways; files cut at many lengths."""
        with tempfile.TemporaryDirectory() as folder:
            world = self._run(Path(folder), SAVED)
        paths = ["/".join(path) for path in _paths({"step_optim": world.optimizer.state_dict()["step_optim"]})]
        cases = [f"{path}/{how}" for path in paths for how in ("missing", *WRONG)]
        cases += [f"file/{part}" for part in range(0, 100, 4)]
        return draw.sample(cases, 12) if size is Size.QUICK else cases

    def run(self, case: str, folder: Path) -> list[str]:
        """Load it: an error changes nothing; without one the run goes on as after the undamaged checkpoint."""
        saved = self._run(folder, SAVED)
        checkpoint = copy.deepcopy(saved.optimizer.state_dict())  # torch shares tensors
        *path, how = case.split("/")
        if path == ["file"]:
            return list(_cut_file(checkpoint, int(how)))
        good = copy.deepcopy(checkpoint)
        _damage(checkpoint, path, how)
        world, whole = self._run(folder, SAVED + 1), self._run(folder, SAVED + 1)
        return list(_load(world, whole, checkpoint, good, path))

    def _run(self, folder: Path, steps: int) -> World:
        world = build(self._scenario, Path(tempfile.mkdtemp(dir=folder)))  # a log is one optimizer's
        for step in range(steps):
            world.step(step)
        return world


def _plausible(path: list[str]) -> bool:
    """Whether this part may have other values that no check can tell from the right ones: how a search begins, counts.

    A checkpoint of a bare optimizer, and an older one, have none. What is unread, the next rejection checks.
    """
    return path == ["step_optim"] or "controller" in path or "unread" in path or path[-1] == "rejected_in_a_row"


def _load(world: World, whole: World, damaged: Any, good: Any, path: list[str]) -> Iterator[str]:
    before = Portrait(world)
    known, own = Portrait(world, before), bits(_without_times(world.optimizer.state_dict()))
    kl = world.optimizer._run.kl
    origin = getattr(kl, "_origin", None)
    try:
        world.optimizer.load_state_dict(damaged)
    except ValueError as error:
        if "checkpoint" not in str(error):
            yield f"an unclear error: {error}"
        if Portrait(world, before).differences(known) or getattr(kl, "_origin", None) is not origin:
            yield "it was refused, but something has changed"
        if bits(_without_times(world.optimizer.state_dict())) != own:
            yield "it was refused, but the counters have changed"
        world.optimizer.load_state_dict(copy.deepcopy(good))
    whole.optimizer.load_state_dict(copy.deepcopy(good))
    for each in (world, whole):
        torch.manual_seed(3)
        with warnings.catch_warnings():  # what a wrong entry takes for unread, the next rejection finds out and tells
            warnings.filterwarnings("ignore", message="keep=: the KL closure reads")
            each.step(SAVED)
            each.step(SAVED + 1)
        each.optimizer.summary()
        each.optimizer.state_dict()
    if _plausible(path):
        return
    if Portrait(world).differences(Portrait(whole)):
        yield "the steps that follow differ"
    if world.optimizer.last.reference_drift != whole.optimizer.last.reference_drift and "kl" not in path:
        yield "the drift that follows differs"


def _cut_file(checkpoint: Any, percent: int) -> Iterator[str]:
    """A file that was not written to its end cannot be mistaken for a checkpoint."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    data = file.getvalue()
    try:
        torch.load(io.BytesIO(data[: len(data) * percent // 100]), weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        return
    yield "a part of a file was read"


def _paths(state: Any, *path: str) -> Iterator[tuple[str, ...]]:
    if path:
        yield path
    if isinstance(state, dict):
        for name, value in state.items():
            yield from _paths(value, *path, str(name))


def _damage(checkpoint: Any, path: list[str], how: str) -> None:
    *parents, name = path
    owner = checkpoint
    for parent in parents:
        owner = owner[parent]
    if how == "missing":
        del owner[name]
    else:
        owner[name] = WRONG[how](owner[name])


def _nan(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return torch.full_like(tensor, -1)
    damaged = tensor.clone()
    damaged.view(-1)[-1] = math.nan
    return damaged


def _without_times(state: dict[str, Any]) -> Any:
    own = dict(state["step_optim"])
    own["summary"] = {name: value for name, value in own["summary"].items() if not name.endswith("_seconds")}
    return own
