"""A comparable picture of everything that an optimizer holds: values, types, keys, and who shares what with whom."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from step_optim.snapshot.tensors import dense, plain_tensors

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, torch.dtype, torch.device)


class Picture:
    """All that is reachable from an optimizer, parameters and gradients included, by path.

    It looks where the rollback looks, and further: into ``__slots__`` and the
    cells of closures, so that what the rollback overlooks is seen here.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self.values: dict[str, Any] = {}
        self.objects: dict[str, int] = {}
        self._seen: dict[int, tuple[str, Any]] = {}  # holds the objects, so that ids stay unique
        for index, parameter in enumerate(parameters):
            self._visit(f"parameter {index}", parameter)
            self._visit(f"parameter {index}.grad", parameter.grad)
        self._visit("optimizer", optimizer)

    def _visit(self, path: str, item: Any) -> None:
        if isinstance(item, _PLAIN):
            self.values[path] = f"{type(item).__name__} {item!r}"
        elif id(item) in self._seen:
            self.values[path] = f"the same as {self._seen[id(item)][0]}"
        else:
            self._seen[id(item)] = (path, item)
            self.objects[path] = id(item)
            self.values[path] = type(item).__qualname__
            self._look_into(path, item)

    def _look_into(self, path: str, item: Any) -> None:
        if isinstance(item, Tensor):
            for number, part in enumerate(plain_tensors(item)):
                self.values[f"{path} part {number}"] = _bits(part)
        elif isinstance(item, Mapping):
            self.values[path] = (type(item).__qualname__, [self._name(key) for key in item])
            for key, value in item.items():
                self._visit(f"{path}[{self._name(key)}]", value)
        elif isinstance(item, (list, tuple, deque)):
            self.values[path] = (type(item).__qualname__, len(item))
            for number, value in enumerate(item):
                self._visit(f"{path}[{number}]", value)
        elif isinstance(item, (set, frozenset)):
            self.values[path] = sorted(self._name(key) for key in item)
        elif (stream := _stream(item)) is not None:
            self.values[path] = stream
        else:
            for name, value in _attributes(item).items():
                self._visit(f"{path}.{name}", value)

    def _name(self, key: Any) -> str:
        if id(key) in self._seen:
            return self._seen[id(key)][0]
        if isinstance(key, int) and key in self._seen:  # some optimizers keep state by id(parameter)
            return f"id({self._seen[key][0]})"
        return repr(key) if isinstance(key, (*_PLAIN, tuple)) else type(key).__qualname__

    def difference(self, other: Picture, *, objects: bool = False) -> str:
        """Return where ``other`` first differs from this one; empty if it does not.

        Args:
            other: a later picture, or that of another run.
            objects: tensors and containers must also be the same objects.
        """
        for path in [*self.values, *other.values]:
            if path not in other.values or path not in self.values:
                return f"{path} is {'gone' if path in self.values else 'new'}"
            if self.values[path] != other.values[path]:
                return f"{path} differs{_how(self.values[path], other.values[path])}"
        if objects:
            for path, identity in self.objects.items():
                if other.objects.get(path) != identity and not isinstance(self._seen[identity][1], _SHORT_LIVED):
                    return f"{path} is another object"
        return ""


_SHORT_LIVED = (tuple, types.MethodType)


def _how(a: Any, b: Any) -> str:
    return f": {a:.40} became {b:.40}" if isinstance(a, str) and isinstance(b, str) else ""


def _bits(tensor: Tensor) -> Any:
    flat = dense(tensor.detach()).cpu()
    flat = (torch.view_as_real(flat.resolve_conj()) if flat.is_complex() else flat).contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def _stream(item: Any) -> Any:
    """State of a random generator or an array; None if it is neither."""
    numpy = sys.modules.get("numpy")
    if isinstance(item, torch.Generator):
        return item.get_state().numpy().tobytes()
    if isinstance(item, random.Random):
        return item.getstate()
    if numpy is not None and isinstance(item, numpy.random.Generator):
        return repr(item.bit_generator.state)
    if numpy is not None and isinstance(item, numpy.ndarray):
        return str(item.dtype), item.shape, item.tobytes()
    return None


def _attributes(item: Any) -> dict[str, Any]:
    """What hangs on an object: attributes, slots, the cells of a function."""
    if isinstance(item, types.FunctionType):
        cells = zip(item.__code__.co_freevars, item.__closure__ or (), strict=True)
        return {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    if isinstance(item, types.MethodType):
        return {"__self__": item.__self__, "__func__": item.__func__}
    if isinstance(item, functools.partial):
        return {"func": item.func, "args": item.args, "keywords": item.keywords}
    if type(item).__module__.split(".")[0] in sys.stdlib_module_names:  # loggers, locks, files
        return {}
    slots = [name for cls in type(item).__mro__ for name in _slots(cls)]
    found = {name: getattr(item, name) for name in slots if hasattr(item, name)}
    return found | dict(getattr(item, "__dict__", {}))


def _slots(cls: type) -> Sequence[str]:
    slots = cls.__dict__.get("__slots__", ())
    return [slots] if isinstance(slots, str) else [name for name in slots if name not in ("__dict__", "__weakref__")]


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
