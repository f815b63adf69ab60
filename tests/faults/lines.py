"""Faults at every line of a step, and signals between any two bytecodes."""

from __future__ import annotations

import _thread
import gc
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import step_optim
from step_optim import Action, STEPOptimizer, read_log
from step_optim.snapshot.tensors import digest
from tests.faults.campaign import Size
from tests.faults.portrait import Portrait, ambient_restored
from tests.faults.worlds import World, build

digest([torch.zeros(1)])  # what a process computes once is no line of a step
PACKAGE = str(Path(step_optim.__file__).parent)
FOLLOW = 1
"""Undisturbed steps after the one with the fault."""
SAMPLE = {Size.QUICK: 4, Size.NORMAL: 300}
"""How many bytecodes of a scenario are hit, and in a quick run how many lines."""


class _Trip:
    """``trip[signum]`` marks a signal as arrived without a call, after which python would look for signals.

    So the handler runs where the interpreter itself looks next, as it does for a real Ctrl-C.
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


Place = tuple[str, int, int]
"""File, line, and bytecode in its function (-1: the line as a whole)."""


class Tracer:
    """Counts how often each line, or each bytecode, of step_optim is run, and makes one of those times fail."""

    def __init__(self, fault: str = "error", at: tuple[Place, int] | None = None) -> None:
        self.seen: Counter[Place] = Counter()
        self.fired = self.dropped = False
        self._fault, self._at = fault, at
        self._opcodes = fault == "signal"
        self._trip = _Trip()

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = self._opcodes
        return self._event

    def _event(self, frame: Any, event: str, _: Any) -> Any:
        if event != ("opcode" if self._opcodes else "line"):
            return self._event
        place = (
            frame.f_code.co_filename[len(PACKAGE) + 1 :],
            frame.f_lineno or 0,
            frame.f_lasti if self._opcodes else -1,
        )
        if self._at == (place, self.seen[place]):
            sys.settrace(None)
            self.fired = True
            if self._fault == "signal":
                self._trip[signal.SIGINT]  # type: ignore[index]
                return None
            raise FAULTS[self._fault]("injected")
        self.seen[place] += 1
        return self._event

    def _drop(self, _: Any) -> None:
        """Python itself drops an interrupt that arrives in the callback of a weak reference."""
        self.dropped = True

    def run(self, act: Callable[[], None]) -> BaseException | None:
        """Run something under the tracer; what it raised."""
        gc.disable()  # a finalizer of something else would be traced too
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        report, sys.unraisablehook = sys.unraisablehook, self._drop
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
        finally:
            signal.signal(signal.SIGINT, handler)
            sys.unraisablehook = report
            gc.enable()
        return None


class Undisturbed:
    """A scenario without any fault: what it looks like after the step that will be hit, and later."""

    def __init__(self, world: World) -> None:
        t = world.warm
        for step in range(t):
            world.step(step)
        world.prepare(t)
        before = Portrait(world)
        world.act(t)
        self.after = Portrait(world, before)
        self.record = plain(world.optimizer.last)
        for step in range(t + 1, t + 1 + FOLLOW):
            world.step(step)
        self.end = Portrait(world)
        self.records = [plain(record) for record in read_log(world.log)]


class Lines:
    """A scenario with a fault at one line of one step."""

    def __init__(self, scenario: str) -> None:
        self.name = f"line/{scenario}"
        self._scenario = scenario
        self._known: Undisturbed | None = None

    def cases(self, size: Size, draw: random.Random) -> Iterator[str]:
        """Of each line the first and the last time; of bytecodes a sample."""
        with tempfile.TemporaryDirectory() as folder:
            lines = [(place, n) for place, count in self._trace(folder, "error").items() for n in {0, count - 1}]
            codes = [(place, n) for place, count in self._trace(folder, "signal").items() for n in {0, count - 1}]
        raised = [fault for fault in FAULTS if fault != "signal"]
        if size < Size.ALL:
            codes = draw.sample(codes, SAMPLE[size])
        if size is Size.QUICK:
            lines = draw.sample(lines, SAMPLE[size])
        for at in lines:
            for fault in raised if size is Size.ALL else [draw.choice(raised)]:
                yield _name(*at, fault)
        for at in codes:
            yield _name(*at, "signal")

    def _trace(self, folder: str, fault: str) -> Counter[Place]:
        world = build(self._scenario, Path(folder))
        for step in range(world.warm):
            world.step(step)
        world.prepare(world.warm)
        tracer = Tracer(fault)
        error = tracer.run(lambda: world.act(world.warm))
        assert error is None, error
        return tracer.seen

    def run(self, case: str, folder: Path) -> list[str]:
        """Run the step with the fault; say what is wrong afterwards."""
        at, fault = _read_name(case)
        with ambient_restored():
            whole = self._undisturbed(folder)
            world = build(self._scenario, folder)
            try:
                return list(self._problems(world, whole, at, fault))
            except (Exception, KeyboardInterrupt) as error:
                return [f"afterwards: {type(error).__name__}: {error}"]

    def _undisturbed(self, folder: Path) -> Undisturbed:
        if self._known is None:
            self._known = Undisturbed(build(self._scenario, folder))
        return self._known

    def _problems(self, world: World, whole: Undisturbed, at: tuple[Place, int], fault: str) -> Iterator[str]:
        t, optimizer = world.warm, world.optimizer
        for step in range(t):
            world.step(step)
        world.prepare(t)
        before, last, log, rng = Portrait(world), optimizer.last, _read(world.log), torch.get_rng_state()
        tracer = Tracer(fault, at)
        raised = tracer.run(lambda: world.act(t))
        after = Portrait(world, before)
        if not tracer.fired:
            yield "the fault was not reached"
        if not (raised is None or isinstance(raised, FAULTS[fault])):
            yield f"raised {type(raised).__name__}: {raised}"
        if raised is None and not tracer.dropped and not self._may_pass(optimizer, fault):
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
        if committed and plain(optimizer.last) != whole.record:
            yield "the record is another one"
        if counted and not committed:
            # An interrupt inside contextlib leaves the body of a window to python, which closes it.
            expected = (FAULTS[fault].__name__, "GeneratorExit")[: 1 + (fault == "signal" and world.draws)]
            if optimizer.last.action is not Action.REJECT or not optimizer.last.error.startswith(expected):
                yield f"the record says {optimizer.last.action}, {optimizer.last.error}"
            if optimizer.last.success or optimizer.last.accepted.mean != 0:
                yield "the failed step counts as a success"
        wrong = after.differences(whole.after if committed else before)
        if wrong:
            yield f"{wrong} not as {'after' if committed else 'before'} the step"
        if not _read(world.log).startswith(log):
            yield "earlier lines of the log have changed"
        if [r.step for r in read_log(world.log)] not in ([*range(t)], [*range(t + 1)]):
            yield "the log has lost steps"
        del raised  # its frames hold what the step was working with
        yield from self._goes_on(world, whole, rng, retry=not committed)

    def _goes_on(self, world: World, whole: Undisturbed, rng: torch.Tensor, *, retry: bool) -> Iterator[str]:
        """The steps that follow, the one that failed among them, end where the undisturbed run did."""
        t = world.warm
        if retry:
            if world.draws:
                torch.set_rng_state(rng)
            world.before()
            world.act(t)
        for step in range(t + 1, t + 1 + FOLLOW):
            world.step(step)
        wrong = Portrait(world).differences(whole.end)
        if wrong:
            yield f"{wrong} differ {FOLLOW} steps later"
        done = world.optimizer.summary()["steps"]
        logged = [record for record in read_log(world.log) if record.error is None]
        if [r.step for r in logged][-FOLLOW:] != list(range(done - FOLLOW, done)):
            yield "later steps are not in the log"
        figures = [_without(plain(record), "step", "reward", "notes") for record in logged[-FOLLOW - retry :]]
        if figures != [_without(record, "step", "reward", "notes") for record in whole.records[-FOLLOW - retry :]]:
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


def _name(place: Place, times: int, fault: str) -> str:
    file, line, code = place
    return f"{file}:{line}{f'+{code}' if code >= 0 else ''}#{times}/{fault}"


def _read_name(case: str) -> tuple[tuple[Place, int], str]:
    where, fault = case.rsplit("/", 1)
    file, rest = where.rsplit(":", 1)
    place, times = rest.split("#")
    line, _, code = place.partition("+")
    return ((file, int(line), int(code or -1)), int(times)), fault
