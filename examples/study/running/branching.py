"""The branching experiment: from one theta_t, one proposal is accepted, shrunk, rejected, projected ...

All branches of a state train on the same rollout with the same random numbers. What a branch is worth is the held-out
reward right after it, and after one more ordinary update from there.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ppo
import torch

from step_optim import Action, Budget, Movement
from step_optim.audit import Audit
from study.config import ARMS, BRANCH_FROM, BRANCH_SAMPLES, BRANCHES, CONDITIONS, Branch
from study.running.training import Learner, plain
from study.running.world import World, mean, stream

Record = dict[str, Any]


def make_branches(world: World, seed: int, t: int, root: Path, say: Callable[[int], None]) -> list[Record]:
    """Branch from the state before update t of the run ``BRANCH_FROM``; return one plain record for each branch.

    Raises:
        ValueError: that run did not keep the state.
    """
    done = root / "branches" / str(seed) / f"{t}.json"
    if not done.exists():
        records = branch_off(world, seed, load_state(root, seed, t), say)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.with_suffix(".tmp").write_text(json.dumps([{"seed": seed, "t": t, **record} for record in records]))
        os.replace(done.with_suffix(".tmp"), done)
    found: list[Record] = json.loads(done.read_text())
    return found


def load_state(root: Path, seed: int, t: int) -> Record:
    """Load the state before update t."""
    folder = root.joinpath(*BRANCH_FROM, str(seed))
    if not (folder / f"before-{t}.pt").exists():
        raise ValueError(f"{folder} did not keep the state before update {t}; is it finished, and of this study?")
    state: Record = torch.load(folder / f"before-{t}.pt")
    return state


def branch_off(world: World, seed: int, state: Record, say: Callable[[int], None]) -> list[Record]:
    """Take every branch from one state."""
    records: list[Record] = []
    start: Start | None = None
    for number, (name, branch) in enumerate(BRANCHES.items()):
        say(number)
        with world.adapted(seed) as model:
            learner = Learner(world, ARMS[BRANCH_FROM[0]], CONDITIONS[branch.condition], seed, model)
            learner.load_state_dict(copy.deepcopy(state))
            start = start or Start(learner)
            records.append({"branch": name, "reward_at": start.reward, **take(learner, branch, start)})
    return records


class Start:
    """What all branches of a state share: the reward of theta_t, the rollout, and the candidate."""

    def __init__(self, learner: Learner) -> None:
        self.reward = reward(learner)
        self._numbers = stream(learner.seed, learner.t)
        self.rollout: ppo.Rollout = learner.roll_out(self._numbers)
        self.candidate: tuple[Audit, Audit] | None = None
        """of the first branch, which accepts: audits on the control set and on held-out prompts"""
        self.alpha = math.nan
        """of the branch that shrinks"""

    def numbers(self) -> torch.Generator:
        """The random numbers of the minibatches."""
        return self._numbers.clone_state()


def take(learner: Learner, branch: Branch, start: Start) -> Record:
    """Make the proposal of one branch, let its controller decide, and see what comes of it."""
    world, optimizer = learner.world, learner.optimizer
    factor = world.study.shock_factor * (start.alpha if branch.rate == "shrunk" else 1.0)
    optimizer.param_groups[0]["lr"] = learner.rate * (1.0 if branch.rate == "ordinary" else factor)
    before = copy.deepcopy(optimizer.optimizer.state_dict())
    started = time.monotonic()
    learner.train_on(start.rollout, world.study.beta, start.numbers())
    seconds = time.monotonic() - started
    record = optimizer.last
    if branch.moments != "after":
        part = record.alpha if branch.moments == "between" else 0.0
        optimizer.optimizer.load_state_dict(between(before, optimizer.optimizer.state_dict(), part))
    control, held = learner.control.audit(), learner.held.audit()
    start.candidate = start.candidate or (control, held)
    if record.action is Action.SHRINK:
        start.alpha = record.alpha
    now = start.reward if record.action is Action.REJECT else reward(learner)
    later, following = after_another(learner)
    return {
        "control": plain(record.accepted),
        "held": plain(held.movement),
        "alpha": record.alpha,
        "action": str(record.action),
        "projection": dict(record.projection),
        "distance_control": learner.control.distance(control, start.candidate[0]),
        "distance_held": learner.held.distance(held, start.candidate[1]),
        "seconds": seconds,
        "reward_now": now,
        "reward_next": later,
        "control_next": plain(following),
    }


def between(before: Record, after: Record, part: float) -> Record:
    """Return an optimizer's state with moments a part of the way from one to the other; counts of steps are whole."""
    state = copy.deepcopy(after if part else before)
    for index, own in state["state"].items():
        for name, value in own.items():
            if name != "step" and 0 < part < 1:
                value.lerp_(before["state"][index][name], 1 - part)
    return state


def after_another(learner: Learner) -> tuple[float, Movement]:
    """Make one more update, ordinary and unlimited; return the held-out reward and how far it moved."""
    learner.optimizer.set_budget(Budget(mean=math.inf))
    learner.updates.append({"t": learner.t})
    learner.update()
    return reward(learner), learner.optimizer.last.accepted


def reward(learner: Learner) -> float:
    """Return the mean held-out reward of the current policy."""
    return mean(list(learner.world.held_out_reward(learner.model, learner.seed, BRANCH_SAMPLES).values()))
