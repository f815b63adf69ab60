"""An audit must leave no trace: eval mode and no gradients inside, everything put back afterwards."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from step_optim.host.modules import end_forward, reshard, sharded
from step_optim.host.rng import RNGState
from step_optim.host.undo import undone
from step_optim.isolation.module_state import ModuleState


class _Modes:
    """Puts modules into eval mode one by one, and remembers how each of them was."""

    def __init__(self, state: ModuleState) -> None:
        self.modules: list[nn.Module] = []
        self._hook = RemovableHandle(_global_forward_pre_hooks)  # known before there is a hook that it removes
        self._flags: dict[nn.Module, bool] = {}
        self._patched: list[tuple[Any, Any]] = []
        self._state = state
        state.begin()

    def quiet_all(self, roots: Iterable[nn.Module]) -> None:
        """Quiet the modules of these roots."""
        modules = self._state.below(roots)
        for module in sharded(modules):
            module.reshard()
        self.modules += modules
        patched = []
        for module in modules:
            own = module.__dict__  # faster than attributes, and models have a thousand modules
            if "training" in own:
                self._flags[module], own["training"] = own["training"], False
            else:  # TorchScript has it elsewhere
                self._flags[module] = module.training
                _set_training(module, False)
            if "forward" in own:
                patched.append(module)
        self._state.enter_all(modules)
        for module in patched:
            self._without_autocast(module)

    def quiet(self, module: nn.Module, _inputs: Any = None) -> None:
        """Switch one module to eval mode, and save what it holds."""
        if module in self._flags:
            return
        reshard(module)
        for each in module.modules() if isinstance(module, torch.jit.ScriptModule) else (module,):
            self._flags[each] = each.training  # TorchScript calls those inside it out of sight
            self.modules.append(each)
            _set_training(each, False)
        self._state.enter(module)

    def _without_autocast(self, module: Any) -> None:
        """Undo what accelerate does to ``forward``: it puts autocast inside, out of reach from out here."""
        patched = vars(module).get("forward")
        if type(getattr(patched, "__wrapped__", None)).__name__ == "ConvertOutputsToFp32":  # its outermost decorator
            self._patched.append((module, patched))
            module.forward = module._original_forward

    def watch(self) -> None:
        """Quiet every further module as it is called."""
        _global_forward_pre_hooks[self._hook.id] = self.quiet

    def restore(self) -> None:
        """Put everything back; the flags also if all else fails."""
        self._hook.remove()
        for patched, forward in self._patched:
            patched.forward = forward
        try:
            for module in sharded(self.modules):
                end_forward(module)
                module.reshard()
            self._state.leave()
        finally:
            for module, training in reversed(self._flags.items()):  # a compiled module shares its inner one's flag
                own = module.__dict__
                if "training" in own:
                    own["training"] = training
                else:
                    _set_training(module, training)


def _set_training(module: nn.Module, training: bool) -> None:
    """Set a module's own flag; `nn.Module.__setattr__` takes ten times as long, and models have a thousand modules."""
    if "training" in vars(module):
        vars(module)["training"] = training
    else:  # TorchScript has it elsewhere
        module.training = training


@contextmanager
def isolated(
    modules: Iterable[nn.Module] = (), *, grad: bool = False, watch: bool = True, state: ModuleState | None = None
) -> Iterator[list[nn.Module]]:
    """Run a measurement that nothing afterwards can tell has happened.

    Inside: eval mode, no autograd (unless ``grad``), no autocast, no compiled
    code (it would be compiled anew for eval mode, and calls no hooks), and nothing
    that was computed from other weights: no cached casts, no cached
    parametrizations, no unsharded copy that FSDP2 kept. Afterwards the training
    flag of *every* module, what modules hold (the rule is in `module_state`)
    and all random streams are as before, also if the body raised.

    Modules that are not passed are found as they are called: a KL closure is
    an opaque function, and a BatchNorm inside it would be mutated by a
    train-mode forward. (Methods called directly, not through ``module(...)``,
    escape this; their module has to be passed.)

    Args:
        modules: root modules that the measurement will use.
        grad: keep autograd on, for the distillation steps of `Project`.
        watch: whether modules may be called that were not passed. A hook that
            looks for them makes every call of a module 10 us longer.
        state: knows what the modules held at first, which they hold inside;
            by default they hold inside what they hold now.

    Yields:
        The modules used so far; complete at the end.
    """
    rng, modes, settings = RNGState.capture(), _Modes(state or ModuleState()), _Settings()
    with undone(rng.restore), undone(settings.restore), undone(modes.restore):
        modes.quiet_all(modules)
        if watch:
            modes.watch()
        settings.quiet(grad=grad)
        yield modes.modules


_FIRES_TWICE = (
    "ignore",
    re.compile(r"Using `torch.compile\(module\)` when there are global hooks"),
    UserWarning,
    None,
    0,
)
"""A compiled module warns of global hooks; `_Modes.quiet` is one that may fire twice."""


class _Settings:
    """Settings of the process and the thread that change what a forward computes.

    Their own context managers are not used: an interrupt between two of those would leave some of them open.
    """

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._autocast = [(device, torch.is_autocast_enabled(device)) for device in ("cpu", "cuda")]
        self._parametrize = parametrize._cache_enabled, parametrize._cache
        self._dynamo = sys.modules.get("torch._dynamo.eval_frame")  # only what was imported can have compiled anything
        self._stance = getattr(self._dynamo, "_stance", None)
        self._warnings = list(warnings.filters)

    def quiet(self, *, grad: bool) -> None:
        """Switch off autocast, parametrizations' caches and compiled code; autograd on or off."""
        torch.set_grad_enabled(grad)
        for device, _ in self._autocast:
            torch.set_autocast_enabled(device, False)
        torch.clear_autocast_cache()  # casts of other weights
        parametrize._cache_enabled, parametrize._cache = 0, {}
        if self._dynamo is not None:
            torch.compiler.set_stance("force_eager")
            # Not by warnings.filterwarnings, after which every warning that was shown once is shown again.
            warnings.filters.insert(0, _FIRES_TWICE)  # type: ignore[attr-defined]

    def restore(self) -> None:
        """Set all of them as they were."""
        torch.set_grad_enabled(self._grad)
        for device, enabled in self._autocast:
            torch.set_autocast_enabled(device, enabled)
        torch.clear_autocast_cache()
        parametrize._cache_enabled, parametrize._cache = self._parametrize
        if self._dynamo is not None:
            self._dynamo._stance = self._stance  # type: ignore[attr-defined]
            warnings.filters[:] = self._warnings  # type: ignore[index]
