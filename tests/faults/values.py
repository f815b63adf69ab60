"""Gradients, losses, optimizer states and weights that are not finite."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from step_optim import Action
from tests.faults.campaign import Size
from tests.faults.portrait import Portrait
from tests.faults.worlds import World, build
from tests.strategies import bits

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
PLACES = ("gradient", "state", "weight", "buffer")


class Values:
    """A scenario in which one element, or all of them, of one kind of tensor goes bad before a step."""

    def __init__(self, scenario: str) -> None:
        self.name = f"value/{scenario}"
        self._scenario = scenario

    def cases(self, size: Size, draw: random.Random) -> Iterable[str]:
        """Every place, value and extent."""
        names = [f"{place}/{extent}/{bad}" for place in PLACES for extent in ("one", "all") for bad in BAD]
        names += [f"loss/all/{bad}" for bad in BAD]
        return draw.sample(names, 3) if size is Size.QUICK else names

    def run(self, case: str, folder: Path) -> list[str]:
        """Take the step with the bad value, and the same step again without it."""
        place, extent, bad = case.split("/")
        world, bare, whole = (self._prepared(folder / name) for name in ("hit", "bare", "whole"))
        if place == "loss":
            return list(_loss(world, BAD[bad]))
        return list(_tensor(world, bare, whole, place, extent == "all", BAD[bad]))

    def _prepared(self, folder: Path) -> World:
        world = build(self._scenario, folder)
        world.warm = max(world.warm, 1)  # there has to be some state
        for step in range(world.warm):
            world.step(step)
        world.prepare(world.warm)
        return world


def _loss(world: World, bad: float) -> Iterator[str]:
    """A loss that is not finite makes gradients that are not."""
    t, good = world.warm, world.problem.loss
    world.problem.loss = lambda step: good(step) * bad  # type: ignore[method-assign]
    world.prepare(t)
    yield from _act(world)
    world.problem.loss = good  # type: ignore[method-assign]
    for step in range(t, t + 2):
        world.step(step)
        if world.optimizer.last.error is not None or not _finite(world):
            yield f"a later step ended in {world.optimizer.last.error}"


def _tensor(world: World, bare: World, whole: World, place: str, everywhere: bool, bad: float) -> Iterator[str]:
    t = world.warm
    rng = torch.get_rng_state()
    whole.act(t)
    after = [bits(p) for p in whole.problem.model.parameters()]
    state = _states(whole)
    saved = [(tensor, tensor.clone()) for tensor in _tensors(world, place)]
    if not saved:
        return
    _poison(_tensors(world, place), everywhere, bad)
    _poison(_tensors(bare, place), everywhere, bad)
    torch.set_rng_state(rng)
    yield from _act(world)
    if world.optimizer.last.action is Action.COMMIT and not world.draws:
        bare.problem.optimizer.step()
        if [bits(p) for p in world.problem.model.parameters()] != [bits(p) for p in bare.problem.model.parameters()]:
            yield "what was committed is not what the bare optimizer does"
    if world.optimizer.last.action is not Action.REJECT or _keeps_state(world):
        return
    with torch.no_grad():
        for tensor, good in saved:
            tensor.copy_(good)
    torch.set_rng_state(rng)
    world.before()
    world.act(t)
    if world.draws and place == "buffer":  # the body's own forwards moved the buffers twice
        return
    if [bits(p) for p in world.problem.model.parameters()] != after or _states(world) != state:
        yield "the step after the cure is not that of an undisturbed run"


def _act(world: World) -> Iterator[str]:
    """The step with the bad value ends in a whole commit of finite movement, or changes nothing."""
    before = Portrait(world)
    try:
        world.act(world.warm)
    except ValueError:  # torch.distributions refuses parameters that are not finite
        if world.optimizer.last.success:
            yield "the error is not in the record"
    after = Portrait(world, before)
    record = world.optimizer.last
    if record.action is Action.REJECT:
        moved = {"gradients", "buffers"} if world.draws else set()  # by the body's own forwards and backwards
        moved |= {"optimizer"} if _keeps_state(world) else set()
        parts = [part for part in after.differences(before) if part not in moved]
        if parts:
            yield f"{parts} changed in a step that was rejected"
    elif record.action is not Action.UNCHANGED and not (
        record.accepted.is_finite and math.isfinite(record.update_norm)
    ):
        yield f"{record.action} of {record.accepted}"
    if world.optimizer._run.open is not None:
        yield "the step is still open"


def _keeps_state(world: World) -> bool:
    """Whether the rejection kept the candidate's optimizer state, as it was asked to."""
    return world.optimizer.controller.on_reject == "keep_state" and world.optimizer.last.candidate.is_finite


def _tensors(world: World, place: str) -> list[Tensor]:
    model, inner = world.problem.model, world.problem.optimizer
    found: list[Tensor | None] = {
        "gradient": [p.grad for p in model.parameters()],
        "state": [s for p in model.parameters() for s in inner.state.get(p, {}).values() if isinstance(s, Tensor)],
        "weight": list(model.parameters()),
        "buffer": list(model.buffers()),
    }[place]
    return [t.detach() for t in found if t is not None and t.numel() > 0 and t.is_floating_point()]


@torch.no_grad()
def _poison(tensors: list[Tensor], everywhere: bool, bad: float) -> None:
    if everywhere:
        for tensor in tensors:
            tensor.fill_(bad)
    elif tensors:
        tensors[len(tensors) // 2].view(-1)[-1] = bad


def _finite(world: World) -> bool:
    return all(bool(p.isfinite().all()) for p in world.problem.model.parameters())


def _states(world: World) -> list[object]:
    return [
        bits(list(world.problem.optimizer.state[p].values())) for p in world.problem.model.parameters() if p.numel()
    ]
