"""An audit must leave no trace: eval mode and no gradients inside, everything put back afterwards."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_pre_hooks
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

UNDO_ATTEMPTS = 5
"""How often an undo that fails (out of memory for a temporary, say) is begun again."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: NaN equals itself, -0.0 does not equal 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
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
        self._hook = RemovableHandle(_global_forward_pre_hooks)  # known before there is a hook that it removes
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
        _global_forward_pre_hooks[self._hook.id] = self.quiet

    @torch.no_grad()
    def restore(self) -> None:
        """Put every flag and every buffer back, object and bits."""
        self._hook.remove()
        for module, training, buffers in self._seen.values():
            reshard(module)
            module.training = training
            for name, (buffer, saved) in buffers.items():
                module._buffers[name] = buffer
                if not same_bits(buffer, saved):  # an unneeded write would look like an outside edit
                    buffer.copy_(saved)


@contextmanager
def isolated(modules: Iterable[nn.Module] = (), *, grad: bool = False) -> Iterator[list[nn.Module]]:
    """Run a measurement that nothing afterwards can tell has happened.

    Inside: eval mode, no autograd (unless ``grad``), no autocast, and nothing
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
    rng, modes, settings = RNGState.capture(), _Modes(), Settings.capture()

    def undo() -> None:
        modes.restore()
        settings.restore()
        rng.restore()

    with undone(undo):
        for root in modules:
            for module in root.modules():
                modes.quiet(module)
        modes.watch()
        Settings(grad).restore()
        yield modes.modules


@dataclass(frozen=True)
class Settings:
    """What the process has switched on, for all code that it runs."""

    grad: bool = False
    autocast: Any = (("cpu", False), ("cuda", False))
    parametrizations: Any = None
    """How often ``torch.nn.utils.parametrize.cached()`` was entered, and its cache: of other weights in an audit."""

    @classmethod
    def capture(cls) -> Settings:
        """Read them."""
        return cls(
            torch.is_grad_enabled(),
            tuple((device, torch.is_autocast_enabled(device)) for device, _ in cls.autocast),
            (parametrize._cache_enabled, parametrize._cache),
        )

    def restore(self) -> None:
        """Set them; what autocast has cached in between is of other weights."""
        torch.set_grad_enabled(self.grad)
        for device, enabled in self.autocast:
            torch.set_autocast_enabled(device, enabled)
        torch.clear_autocast_cache()
        parametrize._cache_enabled, parametrize._cache = self.parametrizations or (0, {})


_pending: list[Callable[[], None]] = []
"""Undos of what is open, the innermost last."""


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """Undo afterwards what the body does.

    An interrupt may hit a context manager on its way out, and its clean-up
    then waits for the garbage collector. So a step finishes whatever was
    opened in it (`finish`), and nothing is undone later.

    Args:
        undo: can be called before, and twice.
    """
    _pending.append(undo)
    try:
        yield
    finally:
        _finish(undo)


def pending() -> tuple[Callable[[], None], ...]:
    """Return what is open now."""
    return tuple(_pending)


def finish(before: Sequence[Callable[[], None]]) -> None:
    """Undo what was opened since."""
    for undo in reversed(_pending.copy()):
        if undo not in before:
            _finish(undo)


def _finish(undo: Callable[[], None]) -> None:
    if undo in _pending:
        uninterrupted(undo)
        _pending.remove(undo)


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


def has_fsdp(model: nn.Module) -> bool:
    """Whether a forward of this model gathers weights from other processes."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())
