"""Bit-exact capture and restore of weights, gradients and optimizer; and the way between two points.

What it covers: everything reachable from the optimizer (parameters, ``state``
of any nesting, group values, plain attributes, generators, tensors inside
tensor subclasses), object identity and shared tensors included, and `.grad`.
What it does not: `nn.Module`s and closures that an optimizer holds, objects
with ``__slots__``, files, other processes.
"""

from __future__ import annotations

import math
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from step_optim.isolation import same_bits

_OPAQUE = (nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


class TensorCopy:
    """The bits of one tensor, and the memory that they have to go back to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.alias = tensor.detach()  # that memory, also if `.data` is swapped later
        self.bits = torch.empty_like(_dense(self.alias))

    @property
    def in_place(self) -> bool:
        """Whether the tensor still lives in the memory that it had."""
        a, b = self.tensor, self.alias
        return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)

    @property
    def unchanged(self) -> bool:
        """Whether the tensor has the saved bits, in the memory that it had."""
        return self.in_place and same_bits(_dense(self.alias), self.bits)

    def restore(self) -> None:
        """Put the bits back; the tensor object and its memory are those of the capture."""
        if not self.in_place:
            self.tensor.data = self.alias
        if not same_bits(_dense(self.alias), self.bits):
            _dense(self.alias).copy_(self.bits)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or the memory under it if its elements overlap (an expanded tensor cannot be written)."""
    if torch._debug_has_internal_overlap(tensor) != 1:
        return tensor
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the data: of a subclass (DTensor, quantized state) or a sparse tensor, its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout is torch.strided:
        yield tensor
    else:
        raise TypeError(f"cannot capture a tensor of layout {tensor.layout}; use a strided or COO tensor")


class TensorStore:
    """Copies of many tensors; the buffers are kept from one capture to the next."""

    def __init__(self) -> None:
        self.copies: list[TensorCopy] = []

    def capture(self, tensors: Iterable[Tensor]) -> None:
        """Copy the bits of these tensors, each piece of memory once."""
        old = {id(copy.tensor): copy for copy in self.copies}
        unique: dict[Any, TensorCopy] = {}
        for tensor in tensors:
            copy = old.get(id(tensor))
            if copy is None or copy.tensor is not tensor or not copy.in_place:
                copy = TensorCopy(tensor)
            unique.setdefault(_memory(tensor), copy)
        self.copies = list(unique.values())
        if self.copies:
            torch._foreach_copy_([copy.bits for copy in self.copies], [_dense(copy.alias) for copy in self.copies])

    def restore(self) -> None:
        """Put all bits back."""
        for copy in self.copies:
            copy.restore()


def _memory(tensor: Tensor) -> Any:
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class Weights:
    """The optimizer's parameters: the previous policy's, the candidate's, and any point between the two.

    Parameters that share memory are handled once: interpolating them twice
    would make alpha 0.5 into 0.25.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._store = TensorStore()
        self._candidate: list[Tensor] | None = None

    @property
    def live(self) -> list[Tensor]:
        """The weights as they are now, wherever an optimizer has put their `.data`."""
        return [copy.tensor.detach() for copy in self._store.copies]

    @property
    def previous(self) -> list[Tensor]:
        """theta_t."""
        return [copy.bits.as_strided(copy.alias.shape, _strides(copy)) for copy in self._store.copies]

    @property
    def candidate(self) -> list[Tensor]:
        """What the inner step proposed; known once a controller asks."""
        assert self._candidate is not None
        return self._candidate

    @property
    def parameters(self) -> list[Tensor]:
        """The parameter objects themselves, for autograd."""
        return [copy.tensor for copy in self._store.copies]

    @torch.no_grad()
    def capture(self) -> bool:
        """Take the current weights as theta_t. True if they were it already, bit for bit."""
        self._candidate = None
        parameters = list(self._parameters())
        known = {id(copy.tensor) for copy in self._store.copies}
        unique = {_memory(p): p for p in reversed(parameters)}
        if known == {id(p) for p in unique.values()} and all(copy.unchanged for copy in self._store.copies):
            return True
        self._store.capture(parameters)
        return False

    def _parameters(self) -> Iterator[Tensor]:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                yield from plain_tensors(parameter)

    @torch.no_grad()
    def update(self) -> tuple[bool, float]:
        """Whether any bit differs from theta_t, and the L2 norm of the difference (NaN or inf if it is not finite)."""
        square = 0.0
        moved = False
        for live, previous in zip(self.live, self.previous, strict=True):
            if same_bits(live, previous):
                continue
            moved = True
            wide = torch.complex128 if live.is_complex() else torch.float64
            difference = (live.to(wide) - previous) if live.element_size() == 2 else live - previous
            square += float(torch.linalg.vector_norm(difference.flatten(), dtype=wide)) ** 2
        return moved, math.sqrt(square)

    @torch.no_grad()
    def keep_candidate(self) -> None:
        """Remember the current weights as the candidate, once a step."""
        if self._candidate is None:
            self._candidate = [live.clone() for live in self.live]

    @torch.no_grad()
    def go(self, alpha: float) -> None:
        """Write theta_t + alpha (candidate - theta_t); exactly theta_t at 0 and exactly the candidate at 1."""
        if alpha == 0:
            self._store.restore()
            return
        for live, previous, candidate in zip(self.live, self.previous, self.candidate, strict=True):
            live.copy_(candidate if alpha == 1 else torch.lerp(previous, candidate, alpha))

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Write these weights, one tensor for each of `live`."""
        for live, value in zip(self.live, values, strict=True):
            live.copy_(value)

    @torch.no_grad()
    def realised_alpha(self) -> float:
        """How far along the candidate's direction the current weights are: rounding makes it differ from alpha."""
        assert self._candidate is not None
        along = length = 0.0
        for live, previous, candidate in zip(self.live, self.previous, self._candidate, strict=True):
            wide = torch.complex128 if live.is_complex() else torch.float64
            step, way = (live.to(wide) - previous).flatten(), (candidate.to(wide) - previous).flatten()
            along += float(torch.vdot(way, step).real)
            length += float(torch.vdot(way, way).real)
        return along / length if length > 0 else math.nan

    def restore(self) -> None:
        """Put theta_t back, bit for bit."""
        with torch.no_grad():
            self._store.restore()


def _strides(copy: TensorCopy) -> tuple[int, ...]:
    return copy.bits.stride() if copy.bits.shape == copy.alias.shape else copy.alias.stride()


class OptimizerState:
    """Everything an optimizer's step may change besides the weights: state, attributes, gradients, group values."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._tensors, self._gradients, self._buffers = TensorStore(), TensorStore(), TensorStore()
        self._undo: list[Callable[[], Any]] = []
        self._grad_of: list[tuple[Tensor, Tensor | None]] = []
        self._groups = GroupJournal(optimizer)

    @torch.no_grad()
    def capture(self, buffers: Iterable[Tensor] = ()) -> None:
        """Remember all of it, and some module buffers, which a forward in a loss closure or a window may move."""
        self._buffers.capture(t for buffer in buffers for t in plain_tensors(buffer))
        walk = _Walk(self._optimizer)
        self._undo = walk.undo
        self._tensors.capture(walk.tensors)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._grad_of = [(p, p.grad) for p in parameters]
        self._gradients.capture(t for _, grad in self._grad_of if grad is not None for t in plain_tensors(grad))
        self._groups.forget()

    def watch_groups(self) -> GroupJournal:
        """Return a context; group values that change inside it are rolled back by `restore`, others are not."""
        return self._groups

    def restore(self) -> None:
        """Put all of it back, bit for bit; keys and attributes that were created since are removed."""
        with torch.no_grad():
            for undo in self._undo:
                undo()
            self._tensors.restore()
            self._buffers.restore()
            self._groups.revert()
            self.restore_gradients()

    def restore_gradients(self) -> None:
        """Put the gradients back: 14 of 211 optimizer configurations write into `.grad`."""
        with torch.no_grad():
            for parameter, grad in self._grad_of:
                if parameter.grad is not grad:
                    parameter.grad = grad
            self._gradients.restore()


class GroupJournal:
    """Group values (lr, betas, ...) that changed while it watched.

    A window holds several inner steps, with the user's scheduler between
    them: its lr must survive a rollback, what the optimizer itself wrote must not.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._changes: dict[tuple[int, str], tuple[dict[str, Any], Any]] = {}

    def forget(self) -> None:
        """Start with an empty journal."""
        self._changes = {}

    def __enter__(self) -> None:
        self._before = [
            (group, {key: _saved(value) for key, value in group.items() if key != "params"})
            for group in self._optimizer.param_groups
        ]

    def __exit__(self, *_: object) -> None:
        for group, before in self._before:
            for key in (before.keys() | group.keys()) - {"params"}:
                saved = before.get(key, _MISSING)
                if not _same(saved, group.get(key, _MISSING)):
                    self._changes.setdefault((id(group), key), (group, saved))

    def revert(self) -> None:
        """Put the changed values back; a value that was changed twice goes back to its first."""
        for (_, key), (group, saved) in self._changes.items():
            if saved is _MISSING:
                group.pop(key, None)
            elif isinstance(saved, TensorCopy):
                saved.restore()
                group[key] = saved.tensor
            else:
                group[key] = saved


_MISSING = object()


def _saved(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = TensorCopy(value)
    copy.bits.copy_(_dense(copy.alias))
    return copy


def _same(saved: Any, now: Any) -> bool:
    if isinstance(saved, TensorCopy):
        return saved.tensor is now and saved.unchanged
    return saved is now or (type(saved) is type(now) and bool(saved == now))


class _Walk:
    """All tensors reachable from an optimizer but its parameters, and how to undo changes to what holds them."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.tensors: list[Tensor] = []
        self.undo: list[Callable[[], Any]] = []
        # Parameters are the business of Weights; their objects are kept here so that ids stay unique.
        self._seen: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self._visit(optimizer)

    def _visit(self, item: Any) -> None:
        if (
            item is None
            or isinstance(item, (bool, int, float, complex, str, bytes, *_OPAQUE))
            or id(item) in self._seen
        ):
            return
        self._seen[id(item)] = item
        if isinstance(item, Tensor):
            self.tensors += plain_tensors(item)
        elif isinstance(item, (dict, list, deque, set)):
            self._container(item)
        elif isinstance(item, (tuple, frozenset)):
            self._visit_all(item)
        elif isinstance(item, Optimizer):
            self._optimizer(item)
        elif not self._generator(item) and _has_own_state(item):
            self._visit(vars(item))

    def _visit_all(self, items: Iterable[Any]) -> None:
        for item in items:
            self._visit(item)

    def _container(self, item: Any) -> None:
        members = dict(item) if isinstance(item, dict) else list(item)
        self._visit_all(members.values() if isinstance(members, dict) else members)
        self.undo.append(lambda: _refill(item, members))

    def _optimizer(self, item: Optimizer) -> None:
        """Attributes of an optimizer, but for its group list: scalars in there belong to GroupJournal."""
        for group in item.param_groups:
            self._visit_all(v for k, v in group.items() if k != "params" and not isinstance(v, Tensor))
        attributes = dict(vars(item))
        self._visit_all(value for name, value in attributes.items() if name != "param_groups")
        self.undo.append(lambda: _refill(vars(item), attributes))

    def _generator(self, item: Any) -> bool:
        """Random generators and numpy arrays, which carry their own state."""
        numpy = sys.modules.get("numpy")
        if isinstance(item, torch.Generator):
            state = item.get_state()
            self.undo.append(lambda: item.set_state(state))
        elif isinstance(item, random.Random):
            drawn = item.getstate()
            self.undo.append(lambda: item.setstate(drawn))
        elif numpy is not None and isinstance(item, numpy.random.Generator):
            inner = item.bit_generator.state
            self.undo.append(lambda: setattr(item.bit_generator, "state", inner))
        elif numpy is not None and isinstance(item, numpy.ndarray):
            values = item.copy()
            self.undo.append(lambda: numpy.copyto(item, values))
        else:
            return False
        return True


def _refill(container: Any, members: Any) -> None:
    """Give a container its old members again, in place. An interrupt half-way leaves it usable for a second try."""
    if isinstance(container, list):
        container[:] = members
    elif isinstance(container, dict):
        for key in [key for key in container if key not in members]:
            del container[key]
        container.update(members)
    elif isinstance(container, set):
        # Only what differs: a set that was emptied and refilled would iterate in another order.
        container.difference_update(container.difference(members))
        container.update(members)
    else:
        container.clear()
        container.extend(members)


def _has_own_state(item: Any) -> bool:
    """Whether to look into an object: not into those of the standard library (loggers, locks, files)."""
    return hasattr(item, "__dict__") and type(item).__module__.split(".")[0] not in sys.stdlib_module_names
