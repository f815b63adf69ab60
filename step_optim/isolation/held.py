"""What one module holds at one moment, besides the values of its weights, and how it is put back."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from step_optim.snapshot.generators import OwnState, carries_state
from step_optim.snapshot.tensors import same_bits
from step_optim.snapshot.walk import has_own_state, refill

SMALL = 2**16
"""Elements up to which a tensor that is no buffer is copied, so that writes into it are put back."""

STRUCTURE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
HOOKED = "_output_capturing_hooks_installed"
"""transformers' flag that a model has the hooks that collect its hidden states; its first forward hangs them in."""

INTERNAL = frozenset([*vars(nn.Module()), *STRUCTURE, HOOKED])
"""Attributes that every module has: flags, hooks, and what it is made of; and the flag that goes with hooks."""

_OPAQUE = (str, bytes, int, float, complex, nn.Module, Tensor, type, types.FunctionType, types.MethodType)
_ABSENT = object()

Part = tuple[Any, Any]
"""A dict, list or set, and a copy of it."""


class Held:
    """What one module holds: what it is made of, its attributes, and what is inside these.

    Args:
        module: whose it is; in eval mode.
        kept: ids of the containers that another module holds too; this one's are added.
        memory: addresses of the memory of parameters and buffers. A tensor among the attributes that is a view of such
            memory is not copied: it changes with what training does to them.
    """

    def __init__(self, module: nn.Module, kept: set[int], memory: Collection[int]) -> None:
        self.module = module
        own = vars(module)
        self._structure: list[Part] = [(own[name], own[name].copy()) for name in STRUCTURE if name in own]
        self._attributes: list[Part] = [(part, part.copy()) for part in _parts(module, kept)]
        self._own = [
            (name, OwnState(item)) for _, copy in self._attributes for name, item in _named(copy) if carries_state(item)
        ]
        plain = [
            (part is own, name, tensor)
            for part, copy in self._attributes
            for name, tensor in _named(copy)
            if _is_plain(tensor) and address(tensor) not in memory
        ]
        self._tensors = [(name, Copied(t, bits=t.numel() <= SMALL)) for direct, name, t in plain if direct]
        self._inside = [(name, Copied(t, bits=t.numel() <= SMALL)) for direct, name, t in plain if not direct]

    @property
    def parts(self) -> list[Part]:
        """All containers, each with its copy."""
        return self._structure + self._attributes

    @property
    def same(self) -> bool:
        """Whether the module holds all of this now."""
        return all(_same_members(part, saved) for part, saved in self.parts) and self.same_tensors

    @property
    def has_tensors(self) -> bool:
        """Whether there are tensors, generators or arrays among the attributes, or inside them."""
        return bool(self._tensors or self._inside or self._own)

    @property
    def same_tensors(self) -> bool:
        """Whether tensors among the attributes have their bits, those further inside were not written, others stand."""
        return not (
            any(t.changed for _, t in self._tensors)
            or any(t.written for _, t in self._inside)
            or any(own.changed for _, own in self._own)
        )

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
        for name, copied in self._tensors:
            if copied.changed:
                yield str(name), copied.tensor, copied.tensor
        for name, copied in self._inside:
            if copied.written:
                yield str(name), copied.tensor, copied.tensor
        for name, own in self._own:
            if own.changed:
                yield str(name), own.item, own.item

    def put_back_attributes(self) -> list[str]:
        """Put the attributes back, and what is inside them; what cannot be, in words."""
        for part, saved in self._attributes:
            if not _same_members(part, saved):
                refill(part, _with_internals(part, saved))
        for _, own in self._own:
            own.put_back()
        return [
            f"has written into {name!r}, a tensor {tuple(t.tensor.shape)} that is no buffer; register it as one"
            for name, t in (*self._tensors, *self._inside)
            if not t.put_back()
        ]

    def put_back(self) -> list[str]:
        """Put everything back; what cannot be, in words."""
        problems = []
        for part, saved in self._structure:
            if not _same_members(part, saved):
                new = [f"{key!r}" for key in part if key not in saved] if isinstance(part, dict) else []
                if new and part is not self.module._buffers:
                    problems.append(f"has made {', '.join(new)} in its forward; run a forward before you measure it")
                refill(part, saved)
        return problems + self.put_back_attributes()


class Copied:
    """A tensor that is no parameter.

    Args:
        tensor: itself.
        bits: whether to copy its bits.
    """

    __slots__ = ("_bits", "_version", "tensor")

    def __init__(self, tensor: Tensor, *, bits: bool) -> None:
        self.tensor = tensor
        alias = tensor.detach() if bits else None
        self._bits = alias.clone() if alias is not None and alias.layout is torch.strided else None
        self._version = None if tensor.is_inference() else tensor._version

    @property
    def written(self) -> bool:
        """Whether it was written, but through `.data`."""
        return self._version is not None and self.tensor._version != self._version

    @property
    def changed(self) -> bool:
        """Whether it has other bits, as far as these were copied."""
        return self.written if self._bits is None else not same_bits(self.tensor, self._bits)

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


class Membership:
    """Whether any of many containers has got other members: a few operations for all, where a model has thousands."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._sets = [(part, saved) for part, saved in parts if isinstance(part, set)]
        dicts = [(part, saved) for part, saved in parts if isinstance(part, dict)]
        lists = [(part, saved) for part, saved in parts if not isinstance(part, (dict, set))]
        self._dicts, self._lists = [part for part, _ in dicts], [part for part, _ in lists]
        self._sizes = [len(saved) for _, saved in (*dicts, *lists)]
        self._members = [member for _, saved in (*dicts, *lists) for member in _members(saved)]

    @property
    def same(self) -> bool:
        """Whether all have the very same members."""
        now = chain(chain.from_iterable(map(dict.values, self._dicts)), chain.from_iterable(self._lists))
        return (
            [*map(len, self._dicts), *map(len, self._lists)] == self._sizes
            and all(map(is_, now, self._members))
            and all(part == saved for part, saved in self._sets)
        )


def address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 of one that has none of its own: a sparse one, a wrapper around others."""
    if tensor.layout is not torch.strided or hasattr(tensor, "__tensor_flatten__"):
        return 0
    return tensor.untyped_storage().data_ptr()


def keeps_state(module: nn.Module) -> bool:
    """Whether its forward may leave something in it: torch's own modules leave nothing, but their hooks may."""
    return (
        not type(module).__module__.startswith("torch.nn.")
        or bool(module._forward_hooks)
        or bool(module._forward_pre_hooks)
    )


def is_left_behind(old: Any, new: Any) -> bool:
    """Whether a change is one of data, and not by a move to another device or dtype."""
    if isinstance(old, Tensor) and isinstance(new, Tensor) and not alike(old, new):
        return False
    return _is_data(old) or _is_data(new)


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one device and dtype."""
    return a.device == b.device and a.dtype == b.dtype


def _parts(module: nn.Module, kept: set[int]) -> Iterator[Any]:
    """The module's attributes, and what is inside them and inside its parameters; each once in a reading."""
    own = vars(module)
    yield own
    inside = [value for name, value in own.items() if name not in INTERNAL]
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if hasattr(tensor, "__dict__"):
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


def _named(part: Any) -> Iterable[tuple[Any, Any]]:
    return part.items() if isinstance(part, dict) else enumerate(part)


def _members(part: Any) -> Iterable[Any]:
    return part.values() if isinstance(part, dict) else part


def _same_members(part: Any, saved: Any) -> bool:
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
    """Whether it is a tensor, a generator or an array, or something that holds tensors."""
    if carries_state(value):
        return True
    if isinstance(value, (list, tuple, dict, set, deque)):
        return any(_is_plain(member) for member in _members(value))
    part = None if _is_plain(value) else _inside(value)
    return _is_plain(value) or (part is not None and any(_is_plain(member) for member in part.values()))
