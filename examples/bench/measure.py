"""Time and memory: paired and interleaved, so that a machine that slows down slows all methods down."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def nothing() -> None:
    """Do nothing."""


SLOW_ROUNDS = 2


@dataclass(frozen=True)
class Method:
    """One way to make a training step, in the parts that are measured apart."""

    name: str
    step: Callable[[], Any]
    """What follows the backward pass: the optimizer step, and everything that watches over it."""

    backward: Callable[[], Any] = nothing
    """Loss and gradients."""

    prepare: Callable[[], Any] = nothing
    """Untimed: puts everything back, so that every repetition does the same."""

    facts: Callable[[], Mapping[str, float]] = field(default=dict)
    """Figures of the step that was made, read after it."""

    slow: bool = False
    """Measured in `SLOW_ROUNDS` rounds only, and its memory not at all: it holds what its quicker sibling holds."""

    def run(self) -> None:
        """The whole step."""
        self.backward()
        self.step()


@dataclass
class Timings:
    """What was measured of one method, a value a round; slow methods are in the first rounds only."""

    seconds: list[float] = field(default_factory=list)
    facts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, seconds: float, facts: Mapping[str, float]) -> None:
        """Keep one round."""
        self.seconds.append(seconds)
        for name, value in facts.items():
            self.facts.setdefault(name, []).append(float(value))


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until the device is done."""
    synchronise(device)
    start = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - start


def interleaved(
    methods: Sequence[Method],
    rounds: int,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    enough: float = math.inf,
) -> dict[str, Timings]:
    """Run every method once a round, in an order that rotates; no further round after ``enough`` seconds."""
    found = {method.name: Timings() for method in methods}
    start = time.monotonic()
    for number in range(rounds):
        first = number * max(1, len(methods) // rounds) % len(methods)
        for method in [*methods[first:], *methods[:first]]:
            if not method.slow or number < SLOW_ROUNDS:
                method.prepare()
                seconds = timed(method.run, device)
                found[method.name].add(seconds, method.facts())
        say(f"round {number + 1} of {rounds}")
        if time.monotonic() - start > enough:
            break
    return found


@dataclass(frozen=True)
class Figure:
    """A median over rounds, and its range."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Of one value a round."""
        return cls(statistics.median(values), min(values), max(values))


def paired(a: Timings, b: Timings, unit: Timings, combine: Callable[[float, float, float], float]) -> Figure:
    """Combine three methods' seconds round by round, over the rounds that they share."""
    return Figure.of([combine(*values) for values in zip(a.seconds, b.seconds, unit.seconds, strict=False)])


def ratio(method: Timings, bare: Timings) -> Figure:
    """Time over the bare step's of the same round."""
    return paired(method, bare, bare, lambda t, t_bare, _: t / t_bare)


def overhead(method: Timings, bare: Timings, forward: Timings) -> Figure:
    """What a step costs beyond the bare one, in plain control forwards."""
    return paired(method, bare, forward, lambda t, t_bare, unit: (t - t_bare) / unit)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most memory that tensors held during a call, above what they held at its start."""
    return allocated(call, device)[0]


def allocated(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Bytes above those at the start of a call: the most during it, and what is left at its end."""
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before
    with _hushed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    return _running_sum(prof)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep off the screen what the profiler's C++ code writes on stderr every time."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _running_sum(prof: profile) -> tuple[int, int]:
    """The highest and the last running sum of the allocations and frees that a profile has seen."""
    assert prof.profiler is not None
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held


def peaks(method: Method, device: torch.device) -> dict[str, int]:
    """Peak of the whole step, and of the part after the backward pass."""
    method.prepare()
    first, gradients = allocated(method.backward, device)
    second = peak_bytes(method.step, device)
    return {"peak_run": max(first, gradients + second), "peak_step": second}


def clean(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Checkpoint:
    """Weights and optimizer state at one moment, written back in place as often as wanted."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._weights = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        self._state = {
            p: {name: value.clone() for name, value in optimizer.state[p].items() if isinstance(value, Tensor)}
            for p, _ in self._weights
        }

    @torch.no_grad()
    def put_back(self) -> None:
        """Write everything back, and drop the gradients."""
        for p, weight in self._weights:
            p.copy_(weight)
            p.grad = None
            for name, value in self._state[p].items():
                self._optimizer.state[p][name].copy_(value)
