"""What `PolicyKL` reads of a policy at rest, and of one that moved next to nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from step_optim.audit.noise import SIZES, NoiseFloor, narrowest, read_ladder, trained_weights
from step_optim.audit.parameters import tensors_of
from step_optim.host.modules import has_fsdp
from step_optim.isolation.stand_ins import standing_in
from step_optim.movement import Movement

NO_POLICY = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
"""What distributions raise of parameters that are none: a scale below 0, a matrix that is not positive definite."""


@dataclass(frozen=True)
class AtRest:
    """Reads a policy whose weights do not move, isolated by the caller."""

    fn: Callable[[], Any]
    """Returns the policy with its graph."""

    evaluate: Callable[[], Any]
    """Calls it and checks what it returned."""

    keep: Callable[[Any], Any]
    """Copies that."""

    movement: Callable[[Any, Any], Movement]
    """Of the first of two copies from the second."""

    used: Callable[[], Sequence[nn.Module]]
    """The modules that were called so far."""

    def noise_floor(self) -> NoiseFloor | None:
        """Read the policy at rest, and moved by less and less; every process calls fn equally often.

        Raises:
            ValueError: unmoved weights do not read 0.
        """
        here = self.keep(self.evaluate())
        _check_rest(self.movement(self.keep(self.evaluate()), here))
        called = self.used()
        if not called or any(has_fsdp(module) for module in called):
            return None
        held = (p for module in called for p in module._parameters.values() if p is not None)
        weights = trained_weights(p for p in held if p.requires_grad)
        if not weights:
            self._warn_unless_moved(weights)
            return None
        ladder = read_ladder(weights, self._moved, self.movement, here)
        if ladder.is_still:
            self._warn_unless_moved(weights)
        return None if ladder.is_still else ladder.floor(narrowest(weight.dtype for weight in weights))

    def _moved(self, weights: Mapping[int, Tensor]) -> Any:
        """The policy with other tensors in the place of weights; None if they give none."""
        with standing_in(self.used(), weights):
            try:
                output = self.evaluate()
            except NO_POLICY:
                return None
            return self.keep(output)

    def _warn_unless_moved(self, weights: Sequence[Tensor]) -> None:
        """Warn, unless fn reads anything else that is trained, a bare parameter say."""
        if not self.reads_beside(weights):
            _warn_of_rest(weights)

    def reads_beside(self, weights: Sequence[Tensor]) -> bool:
        """Whether fn reads anything that is trained beside these weights: a graph leads there."""
        with standing_in(self.used(), {id(w): w.detach() for w in weights}), torch.enable_grad():
            out = self.fn()
        return any(tensor.requires_grad for tensor in tensors_of(out).values())


def _check_rest(still: Movement) -> None:
    if math.isnan(still.mean):
        raise ValueError("the policy that fn returned has NaN in it; repair the model, or what fn makes of it")
    if still.mean != 0:
        raise ValueError(
            f"unmoved weights read K = {still.mean:.3g} nats instead of 0 (worst {still.worst}): fn draws random "
            "numbers in eval mode (samples its observations, dropout by a functional call), keeps a state, or is "
            "not deterministic. Give it fixed observations and a function of the weights alone, or accept that "
            "much noise with noise_floor=False"
        )


def _warn_of_rest(weights: Sequence[Tensor]) -> None:
    moved = f"it read next to 0 when their {len(weights)} trained tensors were moved by {SIZES[0]:.0%}"
    found = moved if weights else "none of their parameters requires gradients"
    warnings.warn(
        f"nothing that is trained moves this policy. Of the modules that fn calls: {found}. Every step would be "
        "committed. Let fn call the model that is trained, not a copy of it; noise_floor=False leaves this check out",
        stacklevel=6,
    )
