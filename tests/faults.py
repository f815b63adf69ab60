"""The fault campaign: faults at every line of a step, and a kill between any two writes of a run.

``python -m tests.faults`` runs all of it and prints how many cases there were (exit 1 if one failed);
``tests/test_faults.py`` runs a seeded sample. A case is the same step from the same state with one fault in it.
Afterwards everything is bit for bit as before the step or as after the undisturbed one, `last`, the counters
and the log tell which, and the steps that follow end where those of an undisturbed run end.
"""

from __future__ import annotations

import _thread
import argparse
import json
import random
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import step_optim
from step_optim import Action, Budget, Gate, Interpolate, PolicyKL, Project, STEPOptimizer, read_log
from tests.strategies import Policy, Problem, bits, policy_problem, token_problem

PACKAGE = str(Path(step_optim.__file__).parent)
WARM = 1
"""Steps before the one with the fault, unless the scenario is about the first."""
FOLLOW = 2
"""Undisturbed steps after it."""


# What is trained ------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A run that can be built again, bit for bit: `prepare` makes a gradient, `act` takes the step."""

    problem: Problem
    optimizer: STEPOptimizer
    log: Path
    act: Callable[[int], None]
    before: Callable[[], None] = lambda: None
    """Before every step, outside of it."""
    draws: bool = False
    """The user's own code draws random numbers during the step: no rollback can rewind those."""
    warm: int = WARM

    def prepare(self, step: int) -> None:
        """All that comes before `act`."""
        if self.draws:
            torch.manual_seed(1000 + step)
        self.problem.backward(step)
        self.before()
        self.optimizer.note(reward=float(step), tag=f"step {step}")

    def step(self, step: int) -> None:
        """Make one undisturbed step."""
        self.prepare(step)
        self.act(step)


class Follower(torch.optim.Optimizer):
    """Keeps a second copy of the weights, as schedule-free optimizers do, and a tensor that all parameters share."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr, "seen": 0})
        self.shared, self.history = torch.zeros(1), [0.0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move z along the gradient, and the weights half way to z."""
        loss = None if closure is None else closure()
        self.shared += 1
        self.history.append(float(self.shared))
        for group in self.param_groups:
            group["seen"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["z"], state["count"] = p.clone(), self.shared
                    state["z"] -= group["lr"] * p.grad.sign()
                    p.lerp_(state["z"], 0.5)
        return loss


def _world(
    problem: Problem, folder: Path, budget: Budget | float, controller: Any = None, warm: int = WARM, **options: Any
) -> World:
    log = folder / "run.jsonl"
    log.unlink(missing_ok=True)
    optimizer = STEPOptimizer(
        problem.optimizer, kl=problem.kl, budget=budget, controller=controller, log=log, **options
    )
    return World(problem, optimizer, log, lambda step: optimizer.step(), warm=warm)


def _with_closure(world: World) -> World:
    """Hand the loss closure to the step."""
    problem = world.problem

    def act(step: int) -> None:
        def closure() -> Tensor:
            problem.optimizer.zero_grad()
            loss = problem.loss(step)
            loss.backward()
            return loss

        world.optimizer.step(closure)

    world.act, world.draws = act, True
    return world


def _windowed(world: World) -> World:
    """Make two inner steps one candidate."""

    def act(step: int) -> None:
        with world.optimizer.window():
            for part in range(2):
                world.problem.backward(10 * step + part)
                world.optimizer.step()

    world.act, world.draws = act, True
    return world


def _function(seed: int) -> tuple[Problem, Callable[[], None]]:
    """A policy with dropout and BatchNorm under a plain function, which keeps its own reference."""
    torch.manual_seed(seed)
    model, observations, data = Policy(), torch.randn(6, 5), torch.randn(64, 7, 5)
    reference: list[Tensor] = []

    def take() -> None:
        model.eval()
        with torch.no_grad():
            reference[:] = [model(observations).log_softmax(-1)]
        model.train()

    def kl() -> dict[str, Tensor]:
        now = model(observations).log_softmax(-1)
        each = (now.exp() * (now - reference[0])).sum(-1).clamp_min(0)
        return {"mean": each.mean(), "a": each[:3].mean()}

    inner = torch.optim.AdamW(model.parameters(), lr=0.05)
    return Problem(model, inner, kl, lambda step: data[step % 64]), take  # type: ignore[arg-type]


def _plain(folder: Path) -> World:
    problem, take = _function(3)
    world = _world(problem, folder, Budget(mean=1e-3, slices={"a": 1e-3}))
    world.before = take
    return world


def _followed(folder: Path, controller: Any) -> World:
    problem = policy_problem(7)
    problem.optimizer = Follower(problem.model.parameters(), lr=0.05)
    return _world(problem, folder, 1e-4, controller, param_like="z")


def _gaussian(folder: Path) -> World:
    """A policy that is a distribution object."""
    problem = policy_problem(8)
    model, observations = problem.model, torch.randn(6, 5)
    problem.kl = PolicyKL(lambda: torch.distributions.Normal(model(observations), model.scalar.exp()))
    return _world(problem, folder, 1e-3)


SCENARIOS: dict[str, Callable[[Path], World]] = {
    "commit": lambda folder: _world(policy_problem(1), folder, 1e3),
    "commit tokens": lambda folder: _world(token_problem(1), folder, Budget(mean=1e3, reference=1e3)),
    "first commit": lambda folder: _world(policy_problem(2), folder, 1e3, warm=0),
    "first reject": lambda folder: _world(token_problem(2), folder, 1e-9, Gate(), warm=0),
    "unchanged": lambda folder: _world(policy_problem(1, lr=0.0), folder, 1e3),
    "reject": lambda folder: _world(token_problem(3), folder, 1e-9, Gate()),
    "keep_state": lambda folder: _world(policy_problem(4), folder, 1e-9, Gate(on_reject="keep_state")),
    "shrink": lambda folder: _world(token_problem(5), folder, Budget(mean=1e-4, slices=2e-4), Interpolate()),
    "shrink policy": lambda folder: _world(policy_problem(5), folder, 1e-4),
    "project": lambda folder: _world(token_problem(6), folder, Budget(mean=1e-4, slices=2e-4), Project(steps=1)),
    "window": lambda folder: _windowed(_world(policy_problem(6), folder, 1e-4)),
    "loss closure": lambda folder: _with_closure(_world(policy_problem(7), folder, 1e-4)),
    "restep": lambda folder: _world(policy_problem(8), folder, 1e-4, shrink="restep"),
    "restep closure": lambda folder: _with_closure(_world(policy_problem(8), folder, 1e-4, shrink="restep")),
    "copies": lambda folder: _followed(folder, Interpolate()),
    "copies keep_state": lambda folder: _followed(folder, Gate(on_reject="keep_state")),
    "on_error": lambda folder: _world(policy_problem(9), folder, 1e-4, on_error="reject"),
    "plain function": _plain,
    "distribution": _gaussian,
}


# What must not change -------------------------------------------------------------------------------------------------


class Portrait:
    """Everything that a step may touch: bits, types, keys, and which objects they are.

    Objects known to an earlier portrait are named by their number there, new
    ones by the order in which they are met: so portraits of two runs of the
    same program can be compared.
    """

    def __init__(self, world: World, earlier: Portrait | None = None) -> None:
        self._numbers: dict[int, Any] = {} if earlier is None else dict(earlier._numbers)
        self._alive: list[Any] = [] if earlier is None else list(earlier._alive)
        self._new = 0
        self._fresh = "old" if earlier is None else "new"
        model, inner = world.problem.model, world.problem.optimizer
        self.parts: dict[str, Any] = {
            "parameters": [(self._name(p), p.requires_grad, bits(p)) for p in model.parameters()],
            "gradients": [self._of(p.grad) for p in model.parameters()],
            "buffers": [(self._name(b), bits(b)) for b in model.buffers()],
            "modes": [module.training for module in model.modules()],
            "optimizer": self._of({k: v for k, v in vars(inner).items() if "hook" not in k}),
            "hooks": _hooks(model),
            "ambient": _ambient(),
        }
        if not world.draws:
            self.parts["rng"] = (bits(torch.get_rng_state()), random.getstate(), repr(np.random.get_state()))

    def _name(self, item: Any) -> Any:
        if id(item) not in self._numbers:
            self._new += 1
            self._numbers[id(item)] = (self._fresh, self._new)
            self._alive.append(item)  # an id must not be used twice
        return self._numbers[id(item)]

    def _of(self, item: Any, depth: int = 0) -> Any:
        if isinstance(item, Tensor):
            return self._name(item), type(item).__name__, item.requires_grad, bits(item)
        if isinstance(item, dict):
            return type(item).__name__, [
                (self._name(k) if isinstance(k, Tensor) else k, self._of(v, depth + 1)) for k, v in item.items()
            ]
        if isinstance(item, (list, tuple)):
            return type(item).__name__, [self._of(v, depth + 1) for v in item]
        return type(item).__name__, bits(item) if not callable(item) else "callable"

    def differences(self, other: Portrait) -> list[str]:
        return [part for part, value in self.parts.items() if repr(value) != repr(other.parts[part])]


def _hooks(model: nn.Module) -> list[int]:
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    module = torch.nn.modules.module
    everywhere = [len(module._global_forward_pre_hooks), len(module._global_forward_hooks)]
    return everywhere + [len(getattr(m, name)) for m in model.modules() for name in names]


def _ambient() -> Any:
    """Settings of the process that an audit changes for a while."""
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return (
        torch.is_grad_enabled(),
        nesting,
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.is_autocast_cache_enabled(),
        parametrize._cache_enabled,
        len(parametrize._cache),
    )


@contextmanager
def _ambient_restored() -> Iterator[None]:
    """One case that fails must not spoil those after it."""
    module = torch.nn.modules.module
    hooks, grad, enabled = dict(module._global_forward_pre_hooks), torch.is_grad_enabled(), parametrize._cache_enabled
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    casts = [(device, torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")]
    try:
        yield
    finally:
        module._global_forward_pre_hooks.clear()
        module._global_forward_pre_hooks.update(hooks)
        torch.set_grad_enabled(grad)
        parametrize._cache_enabled, parametrize._cache = enabled, {}
        for device, flag in casts:
            torch.set_autocast_enabled(device, flag)
        while torch.autocast_decrement_nesting() > nesting:
            pass
        while torch.autocast_increment_nesting() < nesting:
            pass


# Faults at a line -----------------------------------------------------------------------------------------------------


class _Trip:
    """``trip[signum]`` marks a signal as arrived, without a call in Python, after which its handler would run at once.

    So the handler runs where the interpreter next looks for signals, as it
    does for a real Ctrl-C at that line.
    """

    __getitem__ = _thread.interrupt_main


class Boom(RuntimeError):
    """The injected error."""


FAULTS: dict[str, type[BaseException]] = {
    "error": Boom,
    "out of memory": torch.OutOfMemoryError,
    "interrupt": KeyboardInterrupt,
    "signal": KeyboardInterrupt,
}

Place = tuple[str, int]
"""File and line."""


def _ours(code: types.CodeType) -> bool:
    return code.co_filename.startswith(PACKAGE)


def _everything(code: types.CodeType) -> bool:
    return code.co_filename != __file__


class Tracer:
    """Counts the lines that are run, and makes the n-th of them fail."""

    def __init__(self, follows: Callable[[types.CodeType], bool], at: int | None = None, fault: str = "error") -> None:
        self.places: list[Place] = []
        self._follows, self._at, self._fault = follows, at, fault
        self._lines = 0
        self._trip = _Trip()
        self.fired = False

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        return self._line if self._follows(frame.f_code) else None

    def _line(self, frame: Any, event: str, _: Any) -> Any:
        if event != "line":
            return self._line
        self._lines += 1
        if self._at is None:
            self.places.append((frame.f_code.co_filename, frame.f_lineno))
        elif self._lines == self._at + 1:
            sys.settrace(None)
            self.fired = True
            if self._fault == "signal":
                self._trip[signal.SIGINT]  # type: ignore[index]
                return None
            raise FAULTS[self._fault]("injected")
        return self._line

    def run(self, act: Callable[[], None]) -> BaseException | None:
        """Run something under the tracer; what it raised."""
        try:
            sys.settrace(self)
            try:
                act()
            finally:
                sys.settrace(None)
            for _ in range(2):  # a signal that has arrived is delivered here at the latest
                time.monotonic()
        except (Boom, KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError) as error:
            return error.with_traceback(None)
        return None


class Undisturbed:
    """A scenario without any fault: what it looks like at every step, and the lines of the one that will be hit."""

    def __init__(self, name: str, folder: Path, follows: Callable[[types.CodeType], bool] = _ours) -> None:
        self.name, self.folder, self.follows = name, folder, follows
        world = SCENARIOS[name](folder)
        t = world.warm
        for step in range(t):
            world.step(step)
        world.prepare(t)
        before = Portrait(world)
        tracer = Tracer(follows)
        error = tracer.run(lambda: world.act(t))
        assert error is None, error
        self.places = tracer.places
        self.after = Portrait(world, before)
        self.record = plain(world.optimizer.last)
        for step in range(t + 1, t + 1 + FOLLOW):
            world.step(step)
        self.end = Portrait(world)
        self.records = [plain(record) for record in read_log(world.log)]

    def case(self, at: int, fault: str) -> list[str]:
        """Run the step with a fault at its n-th line; return what is wrong afterwards."""
        with _ambient_restored():
            world = SCENARIOS[self.name](self.folder)
            try:
                return list(self._problems(world, at, fault))
            except (Exception, KeyboardInterrupt) as error:
                return [f"afterwards: {type(error).__name__}: {error}"]
            finally:
                world.optimizer.__dict__["_sink"].close()

    def _problems(self, world: World, at: int, fault: str) -> Iterator[str]:
        t, optimizer = world.warm, world.optimizer
        for step in range(t):
            world.step(step)
        world.prepare(t)
        before, last, log = Portrait(world), optimizer.last, _read(world.log)
        tracer = Tracer(self.follows, at, fault)
        raised = tracer.run(lambda: world.act(t))
        after = Portrait(world, before)
        if not tracer.fired:
            yield "the fault was not reached"
        if not (raised is None or isinstance(raised, FAULTS[fault])):
            yield f"raised {type(raised).__name__}: {raised}"
        if raised is None and not self._may_pass(optimizer, fault):
            yield "the fault was swallowed"
        run = optimizer._run
        if run.open is not None:
            yield "the step is still open"
        counted = optimizer.last is not last
        if run.progress.step != t + counted or optimizer.summary()["steps"] != t + counted:
            yield f"counted {run.progress.step} steps"
        committed = counted and optimizer.last.error is None
        if not counted and run.notes != {"reward": float(t), "tag": f"step {t}"}:
            yield "the notes are lost"
        if counted and (optimizer.last.reward, dict(optimizer.last.notes)) != (float(t), {"tag": f"step {t}"}):
            yield "the notes are not in the record"
        if committed and plain(optimizer.last) != self.record:
            yield "the record is another one"
        if counted and not committed:
            expected = type(FAULTS[fault]()).__name__
            if optimizer.last.action is not Action.REJECT or expected not in optimizer.last.error:
                yield f"the record says {optimizer.last.action}, {optimizer.last.error}"
            if optimizer.last.success or optimizer.last.accepted.mean != 0:
                yield "the failed step counts as a success"
        wrong = after.differences(self.after if committed else before)
        if wrong:
            yield f"{wrong} not as {'after' if committed else 'before'} the step"
        if not _read(world.log).startswith(log):
            yield "earlier lines of the log have changed"
        if [r.step for r in read_log(world.log)] not in ([*range(t)], [*range(t + 1)]):
            yield "the log has lost steps"
        del raised  # its frames hold what the step was working with
        yield from self._goes_on(world, t, retry=not committed)

    def _goes_on(self, world: World, t: int, *, retry: bool) -> Iterator[str]:
        """The steps that follow, the one that failed among them, end where the undisturbed run did."""
        if retry:
            if world.draws:
                world.prepare(t)
            world.before()
            world.act(t)
        for step in range(t + 1, t + 1 + FOLLOW):
            world.step(step)
        wrong = Portrait(world).differences(self.end)
        if wrong:
            yield f"{wrong} differ {FOLLOW} steps later"
        done = world.optimizer.summary()["steps"]
        logged = [record for record in read_log(world.log) if record.error is None]
        if [r.step for r in logged][-FOLLOW:] != list(range(done - FOLLOW, done)):
            yield "later steps are not in the log"
        figures = [_without(plain(record), "step", "reward", "notes") for record in logged[-FOLLOW - retry :]]
        if figures != [_without(record, "step", "reward", "notes") for record in self.records[-FOLLOW - retry :]]:
            yield "later records differ"

    @staticmethod
    def _may_pass(optimizer: STEPOptimizer, fault: str) -> bool:
        """Whether nothing needs to be raised: the error was settled by a rejection."""
        return optimizer._on_error == "reject" and fault in ("error", "out of memory") and not optimizer.last.success


def plain(record: Any) -> dict[str, Any]:
    """A record without its times."""
    return _without(record.to_dict(), "seconds")


def _without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


@dataclass
class Tally:
    """How many cases there were, and which failed."""

    cases: Counter[str]
    failures: list[str]

    def __str__(self) -> str:
        lines = [f"{count:7d}  {name}" for name, count in self.cases.items()]
        lines.append(f"{self.cases.total():7d}  cases, {len(self.failures)} failures")
        return "\n".join(lines)


def occurrences(places: list[Place], most: int | None = None) -> list[int]:
    """The events to hit: all of them, or of each line the first, the last, and some in between."""
    seen: dict[Place, list[int]] = {}
    for number, place in enumerate(places):
        seen.setdefault(place, []).append(number)
    if most is None:
        return list(range(len(places)))
    chosen = []
    for numbers in seen.values():
        spread = [numbers[round(i * (len(numbers) - 1) / max(most - 1, 1))] for i in range(most)]
        chosen += sorted(set(spread))
    return sorted(chosen)


def inject(name: str, folder: Path, tally: Tally, choose: Callable[[list[Place]], Iterable[tuple[int, str]]],
           follows: Callable[[types.CodeType], bool] = _ours) -> None:
    """Run cases of one scenario."""
    whole = Undisturbed(name, folder, follows)
    for at, fault in choose(whole.places):
        problems = whole.case(at, fault)
        tally.cases[name] += 1
        if problems:
            file, line = whole.places[at]
            tally.failures.append(f"{name}: {fault} at {Path(file).name}:{line} (event {at}): {'; '.join(problems)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--most", type=int, default=None, help="events of each line at most (default: all)")
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--faults", nargs="*", default=list(FAULTS))
    parser.add_argument("--everywhere", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    tally = Tally(Counter(), [])
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or SCENARIOS:
            start, known = time.monotonic(), len(tally.failures)
            inject(name, Path(folder), tally, lambda places: [
                (at, fault) for at in occurrences(places, options.most) for fault in options.faults],
                _everything if options.everywhere else _ours)
            print(f"{name}: {tally.cases[name]} cases, {len(tally.failures) - known} failures, "
                  f"{time.monotonic() - start:.0f} s", flush=True)
            print(*tally.failures[known:], sep="\n")
    print(tally)
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
