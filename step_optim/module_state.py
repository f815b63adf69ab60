"""What modules hold besides the values of their weights: a reading leaves it as it was, and never depends on it.

The rule. An audit may change nothing that outlives it. Of every module that it runs, these are as before when it is
over: parameters (which, where in memory, their bits), buffers (which, shape, bits), attributes (by identity), and what
is inside them, one level deep: members of lists, dicts and sets, attributes of objects and of parameters, elements of
small tensors. And what an earlier forward left in there (a cache, the position offsets of the latest images, tables
that grew with the longest text) must not be read: see `ModuleState`.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from step_optim.state import has_own_state, refill
from step_optim.tensors import Memory, is_plain_memory, same_bits

SMALL = 2**16
"""Elements up to which a tensor that is no buffer is copied, so that writes into it are put back."""

STRUCTURE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
INTERNAL = frozenset([*vars(nn.Module()), *STRUCTURE])
"""Attributes that every module has: flags, hooks, and what it is made of."""

_OPAQUE = (str, bytes, int, float, complex, nn.Module, Tensor, type, types.FunctionType, types.MethodType)
_ABSENT = object()


class ModuleState:
    """What the modules of one KL closure held when they were first seen, and what forwards write.

    Attributes that hold tensors, or that a forward in an audit was seen to
    write, are left behind by forwards: readings begin with what their module
    held at first, buffers that were replaced since included. Any other
    attribute that has changed (a flag, a scaling factor) is taken for a
    setting of the user's, and counts from then on. Buffers are part of the
    policy as they are, unless audits write them.

    Args:
        resets: False to put back what readings write, and nothing else: a plain function may keep its reference in a
            module.
    """

    def __init__(self, *, resets: bool = True) -> None:
        self._resets = resets
        self._first: dict[nn.Module, _Held] = {}
        self._now: dict[nn.Module, _Held] = {}
        self._weights: list[_Weight] = []
        self._volatile: set[nn.Module] = set()
        self._written: set[tuple[nn.Module, str]] = set()
        self._rewritten: set[int] = set()
        self._kept: set[int] = set()
        self._examining = True
        self.stale: set[tuple[nn.Module, str]] = set()
        """Attributes that some forward outside of an audit left behind, so that they were not read."""
        self.learned = False
        """Whether the latest reading found something that forwards write, and may have depended on it."""
        self._problems: list[str] = []

    def begin(self) -> None:
        """Begin a reading; an earlier one may have been given up. The first compares everything with a copy."""
        self._now, self._weights, self._kept, self.learned = {}, [], set(), False

    def forget(self) -> None:
        """Take what the modules hold next for what they held at first."""
        self._first.clear()

    def enter(self, module: nn.Module) -> None:
        """Note what a module holds, before it runs; then let it hold what it held at first."""
        if module in self._now or isinstance(module, torch.jit.ScriptModule):
            return
        self._enter_weights(module)
        if not (self._examining or module in self._volatile or module._buffers or _keeps_state(module)):
            return
        first = self._first.get(module) if self._resets else None
        held = _Held(module, self._kept, thorough=first is None or self._examining or module in self._volatile)
        self._now[module] = held
        if first is None:
            self._first[module] = held
        elif self._left_behind(module, first):
            first.put_back_attributes()
            first.put_back_replaced_buffers()
        elif any(True for _ in first.changes()):
            self._first[module] = held
        for name in module._buffers:
            if (module, name) in self._written:
                self._first[module].put_back_buffer(name)

    def _left_behind(self, module: nn.Module, first: _Held) -> bool:
        """Whether something has changed in this module that is no setting."""
        if module in self._volatile:
            return True
        names = [name for name, old, new in first.changes() if _is_left_behind(old, new)]
        self.stale.update((module, name) for name in names)
        return bool(names)

    def reset(self) -> None:
        """Let every module hold what it held at first; before a further forward of the same reading."""
        for module in self._volatile if self._resets else ():
            if module in self._now:
                self._first[module].put_back_attributes()
        for module, name in self._written if self._resets else ():
            if module in self._now:
                self._first[module].put_back_buffer(name)

    def leave(self) -> None:
        """Put everything back, and note what the reading has changed. What fails does not keep the rest from it."""
        failed: BaseException | None = None
        for put_back in (
            *(partial(self._put_back, held) for held in self._now.values()),
            *(partial(self._put_back_weight, weight) for weight in self._weights),
        ):
            try:
                put_back()
            except BaseException as error:
                failed = error
        if failed is not None:
            raise failed
        self._now, self._weights, self._kept, self._examining = {}, [], set(), False

    def refuse(self) -> None:
        """Refuse a model that cannot be measured without a trace.

        Raises:
            ValueError: the latest reading wrote what cannot be put back.
        """
        problems, self._problems = self._problems, []
        if problems:
            raise ValueError(f"a forward in eval mode leaves a trace that an audit cannot undo: {'; '.join(problems)}")

    def _put_back(self, held: _Held) -> None:
        module = held.module
        first = self._first[module]
        if module not in self._volatile and any(True for _ in first.changes()):
            self._volatile.add(module)
            self.learned = True
        new = {(module, name) for name in held.changed_buffers(first)} - self._written
        self._written |= new
        self.learned |= bool(new)
        self._problems += [f"{type(module).__name__} {what}" for what in held.put_back()]

    def _enter_weights(self, module: nn.Module) -> None:
        renormed = getattr(module, "max_norm", None) is not None
        for name, parameter in module._parameters.items():
            if parameter is not None and is_plain_memory(parameter):
                copied = self._examining or renormed or id(parameter) in self._rewritten
                self._weights.append(_Weight(module, name, parameter, copied=copied))

    def _put_back_weight(self, weight: _Weight) -> None:
        if not weight.put_back():
            return
        if id(weight.parameter) not in self._rewritten and weight.bits is None:
            self._problems.append(
                f"{type(weight.module).__name__} has written into its parameter {weight.name!r}, for the first time"
            )
        self._rewritten.add(id(weight.parameter))


class _Weight:
    """One parameter of a module that is about to run.

    Args:
        module: whose it is.
        name: under which.
        parameter: itself.
        copied: whether to copy its bits: to the host, since there may be no room beside a whole model.
    """

    __slots__ = ("_memory", "_version", "bits", "module", "name", "parameter")

    def __init__(self, module: nn.Module, name: str, parameter: Tensor, *, copied: bool) -> None:
        self.module, self.name, self.parameter = module, name, parameter
        self._memory, self._version = Memory(parameter), parameter._version
        self.bits = parameter.detach().to("cpu", copy=True) if copied and parameter.device.type != "meta" else None

    @torch.no_grad()
    def put_back(self) -> bool:
        """Let it be where it was, with the bits that it had, as far as they were copied; whether it had others."""
        parameter, moved = self.parameter, not self._memory.is_of(self.parameter)
        if moved:
            parameter.data = self._memory.tensor()
        if self.bits is None:
            return not moved and parameter._version != self._version
        if same_bits(parameter, self.bits.to(parameter.device)):
            return False
        parameter.copy_(self.bits)
        return True


class _Held:
    """What one module holds at one moment."""

    def __init__(self, module: nn.Module, kept: set[int], *, thorough: bool) -> None:
        self.module = module
        self._structure = [(part, _copy(part)) for part in map(vars(module).get, STRUCTURE) if part is not None]
        self._attributes = [(part, _copy(part)) for part in _parts(module, kept)]
        self._tensors = [
            _Copied(tensor, bits=(thorough or part is vars(module)) and tensor.numel() <= SMALL)
            for part, copy in self._attributes
            for tensor in _members(copy)
            if _is_plain(tensor)
        ]
        self._buffers = {name: _Copied(b, bits=True) for name, b in module._buffers.items() if b is not None}

    def changes(self) -> Iterator[tuple[str, Any, Any]]:
        """Attributes, and what is inside them, that are others now: (name, then, now)."""
        for part, saved in self._attributes:
            if _same_members(part, saved):
                continue
            if not isinstance(part, dict):
                yield type(part).__name__, saved, part
                continue
            for key in [*saved, *(key for key in part if key not in saved)]:
                old, new = saved.get(key, _ABSENT), part.get(key, _ABSENT)
                if old is not new and key not in INTERNAL:
                    yield str(key), old, new
        for tensor in self._tensors:
            if tensor.changed:
                yield "a tensor", tensor.tensor, tensor.tensor

    def changed_buffers(self, first: _Held) -> list[str]:
        """Names of buffers that the reading replaced or wrote; it began with these, or with those held at first."""
        now = self.module._buffers
        return [
            name
            for name, buffer in self._buffers.items()
            if not any(b is not None and b.stands_as(now.get(name)) for b in (buffer, first._buffers.get(name)))
        ]

    def put_back_replaced_buffers(self) -> None:
        """Put back the buffers in whose place there are others, of the same kind: `Module.to` replaces them too."""
        for name, buffer in self._buffers.items():
            now = self.module._buffers.get(name)
            if now is not None and now is not buffer.tensor and _alike(now, buffer.tensor):
                self.put_back_buffer(name)

    def put_back_attributes(self) -> list[str]:
        """Put the attributes back, and what is inside them; what cannot be, in words."""
        for part, saved in self._attributes:
            if not _same_members(part, saved):
                refill(part, _with_internals(part, saved))
        return [
            f"has written into an attribute that is a tensor {tuple(t.tensor.shape)} and no buffer; register it as one"
            for t in self._tensors
            if not t.put_back()
        ]

    def put_back_buffer(self, name: str) -> None:
        """Put one buffer back, object and bits."""
        if name in self._buffers:
            self.module._buffers[name] = self._buffers[name].tensor
            self._buffers[name].put_back()

    def put_back(self) -> list[str]:
        """Put everything back; what cannot be, in words."""
        problems = []
        for part, saved in self._structure:
            if not _same_members(part, saved):
                new = [f"{key!r}" for key in part if key not in saved] if isinstance(part, dict) else []
                if new and part is not self.module._buffers:
                    problems.append(f"has made {', '.join(new)} in its forward; run a forward before you measure it")
                refill(part, saved)
        problems += self.put_back_attributes()
        for name in self._buffers:
            self.put_back_buffer(name)
        return problems


class _Copied:
    """A tensor that is no parameter, with its bits if it is small or if they are wanted anyway."""

    __slots__ = ("_bits", "_version", "tensor")

    def __init__(self, tensor: Tensor, *, bits: bool) -> None:
        self.tensor = tensor
        alias = tensor.detach() if bits else None
        self._bits = alias.clone() if alias is not None and alias.layout is torch.strided else None
        self._version = None if tensor.is_inference() else tensor._version

    @property
    def changed(self) -> bool:
        """Whether it has other bits; of a large one, whether it was written."""
        if self._bits is None:
            return self._version is not None and self.tensor._version != self._version
        return not same_bits(self.tensor, self._bits)

    def stands_as(self, now: Tensor | None) -> bool:
        """Whether it is this tensor, with its bits."""
        return now is self.tensor and not self.changed

    def put_back(self) -> bool:
        """Give it its bits again, unless it has them: an unneeded write would look like an outside edit."""
        if not self.changed:
            return True
        if self._bits is None:
            return False
        with torch.no_grad():
            if self.tensor.shape != self._bits.shape or self.tensor.is_inference():
                self.tensor.data = self._bits.clone()
            else:
                self.tensor.copy_(self._bits)
        return True


def _keeps_state(module: nn.Module) -> bool:
    """Whether its forward may leave something in it: torch's own modules leave nothing, but their hooks may."""
    return (
        not type(module).__module__.startswith("torch.nn.")
        or bool(module._forward_hooks)
        or bool(module._forward_pre_hooks)
    )


def _parts(module: nn.Module, kept: set[int]) -> Iterator[Any]:
    """The module's attributes, and what is inside them and inside its parameters; each once in a reading."""
    yield vars(module)
    inside = [value for name, value in vars(module).items() if name not in INTERNAL]
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if type(tensor) not in (nn.Parameter, Tensor) and getattr(tensor, "__dict__", None):
            yield vars(tensor)
            inside += vars(tensor).values()
    for value in inside:
        part = _inside(value)
        if part is not None and id(part) not in kept:
            kept.add(id(part))
            yield part


def _inside(value: Any) -> Any:
    if value is None or isinstance(value, _OPAQUE):
        return None
    if isinstance(value, (dict, list, set, deque)):
        return value
    return vars(value) if has_own_state(value) else None


def _copy(part: Any) -> Any:
    return part.copy()


def _members(part: Any) -> Iterable[Any]:
    return part.values() if isinstance(part, dict) else part


def _same_members(part: Any, saved: Any) -> bool:
    """Whether a container has the very same members in the same places."""
    if isinstance(part, set):
        return bool(part == saved)
    return len(part) == len(saved) and all(map(is_, _members(part), _members(saved)))


def _with_internals(part: Any, saved: Any) -> Any:
    """What to put back; of a module's own attributes not its flag, hooks and structure."""
    if isinstance(part, dict) and "_parameters" in part:
        return {**saved, **{name: part[name] for name in INTERNAL if name in part}}
    return saved


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _is_data(value: Any) -> bool:
    """Whether it is a tensor, or something that holds tensors."""
    if isinstance(value, (list, tuple, dict, set, deque)):
        return any(_is_plain(member) for member in _members(value))
    part = None if _is_plain(value) else _inside(value)
    return _is_plain(value) or (part is not None and any(_is_plain(member) for member in part.values()))


def _is_left_behind(old: Any, new: Any) -> bool:
    """Whether a change is of data, and not by a move to another device or dtype."""
    if isinstance(old, Tensor) and isinstance(new, Tensor) and not _alike(old, new):
        return False
    return _is_data(old) or _is_data(new)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype
