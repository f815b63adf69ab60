"""An audit must leave no trace: eval mode and no gradients inside, everything put back afterwards."""

from __future__ import annotations

import random
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_TWO_HOOKS = (
    "ignore",
    re.compile(r"Using `torch.compile\(module\)` when there are global hooks"),
    UserWarning,
    None,
    0,
)
"""A compiled module says that global hooks fire twice; `_Modes.quiet` is one that may."""

UNDO_ATTEMPTS = 5
"""How often an undo that fails (out of memory for a temporary, say) is begun again."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: NaN equals itself, -0.0 does not equal 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.device.type == "meta":  # no bits at all: an inner step has to say itself that it cannot work on these
        return True
    a, b = a.detach(), b.detach()
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    if a.is_floating_point():
        bits = BITS[a.element_size()]
        a, b = a.view(bits), b.view(bits)
    return torch.equal(a, b)


@dataclass(frozen=True)
class RNGState:
    """The random streams that a training loop may draw from: torch, its devices, python, numpy."""

    torch_cpu: Tensor
    devices: dict[str, list[Tensor]]
    python: Any
    numpy: Any

    @classmethod
    def capture(cls) -> RNGState:
        """Read all streams. Devices that were never used are not woken up."""
        devices = {}
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            devices["cuda"] = torch.cuda.get_rng_state_all()
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(),
            devices,
            random.getstate(),
            numpy.random.get_state() if numpy is not None else None,
        )

    def restore(self) -> None:
        """Put all streams back."""
        torch.set_rng_state(self.torch_cpu)
        if "cuda" in self.devices:
            torch.cuda.set_rng_state_all(self.devices["cuda"])
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class _Modes:
    """Puts modules into eval mode one by one, and remembers how each of them was."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._hook: Any = None
        self._seen: dict[int, tuple[nn.Module, bool, dict[str, tuple[Tensor, Tensor]]]] = {}

    def quiet(self, module: nn.Module, _inputs: Any = None) -> None:
        """Save one module's flag and its own buffers, then switch it to eval mode."""
        if id(module) in self._seen:
            return
        reshard(module)
        buffers = {name: (b, b.detach().clone()) for name, b in module._buffers.items() if b is not None}
        self._seen[id(module)] = (module, module.training, buffers)
        self.modules.append(module)
        module.training = False

    def watch(self) -> None:
        """Quiet every further module as it is called."""
        self._hook = register_module_forward_pre_hook(self.quiet)

    @torch.no_grad()
    def restore(self) -> None:
        """Put every flag and every buffer back, object and bits."""
        if self._hook is not None:
            self._hook.remove()
        for module in self.modules:
            end_forward(module)
        for module, training, buffers in reversed(self._seen.values()):  # a compiled module shares its inner one's flag
            reshard(module)
            module.training = training
            for name, (buffer, saved) in buffers.items():
                module._buffers[name] = buffer
                if not same_bits(buffer, saved):  # an unneeded write would look like an outside edit
                    buffer.copy_(saved)


@contextmanager
def isolated(modules: Iterable[nn.Module] = (), *, grad: bool = False) -> Iterator[list[nn.Module]]:
    """Run a measurement that nothing afterwards can tell has happened.

    Inside: eval mode, no autograd (unless ``grad``), no autocast, no compiled
    code (it would be compiled anew for eval mode, and calls no hooks), and nothing
    that was computed from other weights: no cached casts, no cached
    parametrizations, no unsharded copy that FSDP2 kept. Afterwards the training
    flag of *every* module, all module buffers and all random streams are as
    before, also if the body raised.

    Modules that are not passed are found as they are called: a KL closure is
    an opaque function, and a BatchNorm inside it would be mutated by a
    train-mode forward. (Methods called directly, not through ``module(...)``,
    escape this; their module has to be passed.)

    Args:
        modules: root modules that the measurement will use.
        grad: keep autograd on, for the distillation steps of `Project`.

    Yields:
        The modules used so far; complete at the end.
    """
    rng = RNGState.capture()
    modes = _Modes()
    try:
        for root in modules:
            for module in root.modules():
                modes.quiet(module)
        modes.watch()
        with torch.set_grad_enabled(grad), _no_autocast(), _no_cached_parametrizations(), _no_compiled_code():
            yield modes.modules
    finally:

        def undo() -> None:
            modes.restore()
            rng.restore()

        uninterrupted(undo)


def uninterrupted(undo: Callable[[], None]) -> None:
    """Run an idempotent undo to its end; what interrupts it starts it again, and is raised when it is done."""
    interrupt: BaseException | None = None
    for _ in range(UNDO_ATTEMPTS):
        try:
            undo()
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def reshard(module: nn.Module) -> None:
    """Let go of the unsharded weights that FSDP2 keeps after a forward: they are those of other weights.

    Its root module is never resharded by itself outside of a backward pass.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        module.reshard()


def end_forward(module: nn.Module) -> None:
    """Let FSDP2 forget a forward that an exception has broken off: the next one would take itself for its rest.

    It would not be resharded, and its backward pass would gather weights in
    another order than the other processes do.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return
    state = module._get_fsdp_state()
    if state._is_root and state._state_ctx.iter_forward_root is not None:
        module.reset_iter_state()


def has_fsdp(model: nn.Module) -> bool:
    """Whether a forward of this model gathers weights from other processes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


@contextmanager
def _no_cached_parametrizations() -> Iterator[None]:
    """Compute parametrized weights anew, also inside a user's ``torch.nn.utils.parametrize.cached()``."""
    enabled, cache = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}
    try:
        yield
    finally:
        parametrize._cache_enabled, parametrize._cache = enabled, cache


@contextmanager
def _no_compiled_code() -> Iterator[None]:
    """Run the python code of what `torch.compile` has compiled, if anything was."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        yield
        return
    # Not catch_warnings: that makes python forget what it has shown already, and show it again at every step.
    filters: Any = warnings.filters
    filters.insert(0, _TWO_HOOKS)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        filters.remove(_TWO_HOOKS)


@contextmanager
def _no_autocast() -> Iterator[None]:
    """No autocast, and none of the casts that a surrounding region has cached: they are of other weights."""
    torch.clear_autocast_cache()
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.clear_autocast_cache()
