"""The stick test: whether a movement that was taken back stays away, or the optimizer's state brings it back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from step_optim.controllers import Controller, Gate, Outcome, Trial
from step_optim.testing.copying import are_copies
from step_optim.testing.probe import Probe, Setup
from step_optim.testing.verdict import STICKS

DEPTHS = (0, 3, 4, 5, 7)
"""Steps before the movement: state is made in the first; slow weights are synchronised in every fifth or sixth."""

QUIET = (1, 12)
"""Zero-gradient steps after it: in a dozen of them slow weights pull on the others twice."""

_SEED = 5000


class Part(Controller):
    """Shrink every step that is over the budget to one alpha."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.line: list[tuple[Tensor, Tensor]] = []
        """The weights at alpha, and their size."""

    def decide(self, trial: Trial) -> Outcome:
        """Accept the point at alpha."""
        ends = zip(trial.weights.previous, trial.weights.candidate, strict=True)
        self.line = [(torch.lerp(a, b, self.alpha), torch.maximum(a.abs(), b.abs())) for a, b in ends]
        return trial.accept(trial.at(self.alpha))


@dataclass(frozen=True)
class Path:
    """Weights before a step, after what was made of it, and after zero-gradient steps."""

    start: Tensor
    end: Tensor
    later: list[Tensor]

    def sticks(self, committed: Path) -> float:
        """Smallest share of the way from here to the committed step that is still there later, neither less nor more.

        <committed' - this', committed - this> / ‖committed - this‖², with the weights after zero-gradient steps primed.
        """
        way = committed.end - self.end
        length = float(way @ way)
        if length == 0:  # nothing was taken back
            return math.nan
        shares = [float((c - t) @ way) / length for c, t in zip(committed.later, self.later, strict=True)]
        return min(1 - abs(1 - share) for share in shares)

    def midway(self, none: Path, whole: Path) -> float:
        """1 if this leads half-way between two other ends; less by what is missing or too much."""
        shares = []
        for half, a, b in zip(self.later, none.later, whole.later, strict=True):
            way = b - a
            shares.append(1 - 2 * abs(float((half - (a + b) / 2) @ way / (way @ way))) if way.any() else 1.0)
        return min(shares)


def follow(probe: Probe, depth: int, move: Callable[[Probe, int], Any], quiet: Sequence[int] = QUIET) -> Path:
    """Train ``depth`` steps, do something with the next, then train on zero gradients."""
    start = probe.train_all(range(depth)).weights
    move(probe, _SEED + depth)
    end, later = probe.weights, []
    for step in range(1, max(quiet, default=0) + 1):
        probe.train(_SEED + 100 + step, quiet=True)
        if step in quiet:
            later.append(probe.weights)
    return Path(start, end, later)


def _commit(probe: Probe, seed: int) -> None:
    probe.train(seed)


def _put_weights_back(probe: Probe, seed: int) -> None:
    weights = probe.weights
    probe.train(seed)
    probe.write(weights)


class Sticking:
    """The stick test of one optimizer."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.off_the_line = ""
        self.committed = [follow(Probe(setup), depth, _commit) for depth in DEPTHS]

    def weights_only(self) -> float:
        """Put only the weights back."""
        return self._smallest(follow(Probe(self.setup), depth, _put_weights_back) for depth in DEPTHS)

    def half(self, **options: Any) -> float:
        """Have `STEPOptimizer` commit half of the step; note it if that is not on the line."""
        paths = [self._part(depth, 0.5, QUIET, options) for depth in DEPTHS]
        share = self._smallest(paths)
        if share >= STICKS or math.isnan(share) or not are_copies(self.setup, options.get("param_like")):
            return share
        return max(share, self._midway(paths, options))

    def _midway(self, paths: list[Path], options: dict[str, Any]) -> float:
        """How exactly half a step leads half-way between no step (but its moments) and the whole step.

        Slow weights pull on every step, a whole one too, so that its share shrinks by itself.
        """
        rejecting = {"controller": Gate(on_reject="keep_state")} | options
        nothing = [follow(Probe(self.setup, rejecting), depth, Probe.over_budget) for depth in DEPTHS]
        return min(path.midway(none, whole) for path, none, whole in zip(paths, nothing, self.committed, strict=True))

    def _smallest(self, paths: Iterable[Path]) -> float:
        found = [path.sticks(whole) for path, whole in zip(paths, self.committed, strict=True)]
        return min((share for share in found if not math.isnan(share)), default=math.nan)

    def _part(self, depth: int, alpha: float, quiet: Sequence[int], options: dict[str, Any]) -> Path:
        part = Part(alpha)
        probe = Probe(self.setup, {"controller": part} | options)

        def move(probe: Probe, seed: int) -> None:
            probe.over_budget(seed)
            self._check_line(probe, part)

        return follow(probe, depth, move, quiet)

    def _check_line(self, probe: Probe, part: Part) -> None:
        """The weights are the interpolated ones to the bit; or to their rounding, if masters were interpolated."""
        moved = [p.detach() for group in probe.inner.param_groups for p in group["params"]]
        for p, (point, size) in zip(moved, part.line, strict=bool(part.line)):
            off = (p - point).abs()
            if off.any() and not (self._has_masters(probe) and (off <= 2 * torch.finfo(p.dtype).eps * size).all()):
                self.off_the_line = f"half a step is off the line between the weights by {float(off.max()):.1e}"

    def _has_masters(self, probe: Probe) -> bool:
        tensors = (t for state in probe.inner.state.values() for t in state.values() if isinstance(t, Tensor))
        return any(
            t.element_size() > p.element_size() and t.shape == p.shape for t in tensors for p in probe.parameters
        )

    def candidates(self) -> Iterator[tuple[str, ...]]:
        """Sets of state keys with tensors of the parameter's shape, small ones first."""
        probe = Probe(self.setup).train_all(range(2))
        first = max(probe.parameters, key=Tensor.numel)
        state = probe.inner.state.get(first, {})
        keys = [key for key, value in state.items() if isinstance(value, Tensor) and _is_alike(value, first)]
        return (chosen for size in range(1, len(keys) + 1) for chosen in itertools.combinations(keys, size))

    def needed(self) -> tuple[str, ...]:
        """The fewest state keys that make half a step last; none if no set of them does."""
        for keys in self.candidates():
            try:
                if STICKS <= self.half(param_like=keys) < math.inf:
                    return keys
            except Exception:
                continue  # an optimizer may well break when the wrong state is moved
        return ()


def _is_alike(value: Tensor, parameter: Tensor) -> bool:
    return value.shape == parameter.shape and value.is_floating_point()
