"""A comparable picture of everything that a step may touch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from step_optim.host import hooks, undo
from tests.faults.worlds import World
from tests.strategies import bits


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
            self.parts["rng"] = (bits(torch.get_rng_state()), random.getstate(), _numpy())

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
        sorted(hooks._PASSED_OVER),
        len(undo._open.undos),
    )


@contextmanager
def ambient_restored() -> Iterator[None]:
    """One case that fails must not spoil those after it."""
    module = torch.nn.modules.module
    before, grad, enabled = dict(module._global_forward_pre_hooks), torch.is_grad_enabled(), parametrize._cache_enabled
    nesting = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    casts = [(device, torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")]
    try:
        yield
    finally:
        undo._open.undos.clear()
        hooks._PASSED_OVER.clear()
        module._global_forward_pre_hooks.clear()
        module._global_forward_pre_hooks.update(before)
        torch.set_grad_enabled(grad)
        parametrize._cache_enabled, parametrize._cache = enabled, {}
        for device, flag in casts:
            torch.set_autocast_enabled(device, flag)
        while torch.autocast_decrement_nesting() > nesting:
            pass
        while torch.autocast_increment_nesting() < nesting:
            pass


def _numpy() -> Any:
    name, keys, *rest = np.random.get_state()
    return name, keys.tobytes(), rest
