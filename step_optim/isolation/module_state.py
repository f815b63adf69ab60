"""What modules hold besides the values of their weights: a reading leaves it as it was, and never depends on it.

The rule. An audit may change nothing that outlives it. Of every module that it runs, these are as before when it is
over: parameters (which, where in memory, their bits), buffers (which, shape, bits), attributes (by identity), and what
is inside them, one level deep: members of lists, dicts and sets, attributes of objects and of parameters, elements of
small tensors and of arrays, states of random generators. And what an earlier forward left in there (a cache, the
position offsets of the latest images, tables that grew with the longest text) must not be read: see `ModuleState`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from step_optim.isolation.held import Copied, Held, Membership, address, alike, is_left_behind, keeps_state
from step_optim.isolation.read_weights import ReadWeight, ReadWeights
from step_optim.snapshot.tensors import same_bits

Name = tuple[nn.Module, str]
"""A module, and a name in it."""


class ModuleState:
    """What the modules of one KL closure held when they were first seen, and what forwards write.

    Attributes that hold tensors, or that a forward in an audit was seen to
    write, are left behind by forwards: readings begin with what their module
    held at first, buffers that were replaced since included. Any other
    attribute that has changed (a flag, a scaling factor) is taken for a
    setting of the user's, and counts from then on. Buffers are part of the
    policy as they are, unless audits write them.

    The first reading compares everything with a copy. Later ones compare what
    can change without a copy: which objects there are, and versions.

    Args:
        resets: False to put back what readings write, and nothing else: a plain function may keep its reference in a
            module.
    """

    def __init__(self, *, resets: bool = True) -> None:
        self._resets = resets
        self._first: dict[nn.Module, Held] = {}
        self._first_buffers: dict[Name, Copied] = {}
        self._entered: set[nn.Module] = set()
        self._now: dict[nn.Module, Held] = {}
        self._buffers: list[tuple[Name, Copied]] = []
        self._weights = ReadWeights()
        self._volatile: set[nn.Module] = set()
        self._written: set[Name] = set()
        self._kept: set[int] = set()
        self._memory: set[int] = set()
        self._examining = True
        self._tree: tuple[list[nn.Module], list[nn.Module], Membership] | None = None
        self._all: Membership | None = None
        self._with_tensors: list[Held] = []
        self._unchanged = False
        self.stale: set[Name] = set()
        """Attributes that some forward outside of an audit left behind, so that they were not read."""
        self.learned = False
        """Whether the latest reading found something that forwards write, and may have depended on it."""
        self._problems: list[str] = []

    def begin(self) -> None:
        """Begin a reading; an earlier one may have been given up."""
        self._now, self._buffers, self._kept, self._entered = {}, [], set(), set()
        self._weights.begin()
        self._memory = self._weights.addresses
        self.learned = self._unchanged = False

    def examine(self) -> None:
        """Compare everything with a copy in the next reading, too."""
        self._examining = True

    def writes(self, parameter: Tensor) -> bool:
        """Whether forwards write into a parameter, or give it other memory."""
        return self._weights.writes(parameter)

    def forget(self) -> None:
        """Take what the modules hold next for what they held at first."""
        self._first, self._first_buffers, self._all = {}, {}, None
        self._weights.forget()

    def below(self, roots: Iterable[nn.Module]) -> list[nn.Module]:
        """All modules of these roots; a list that is kept until one of them has others below it."""
        roots = list(roots)
        if self._tree is None or self._tree[0] != roots or not self._tree[2].same:
            modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
            below = [module._modules for module in modules if not _is_script(module)]
            self._tree, self._all = (roots, modules, Membership([(part, part.copy()) for part in below])), None
        return self._tree[1]

    def enter_all(self, modules: list[nn.Module]) -> None:
        """Note what these modules hold, as `enter` does, but in a few operations if nothing has changed."""
        if self._examining or self._all is None or not self._all.same:
            for module in modules:
                self._enter_tensors(module)
            for module in modules:
                self._enter_attributes(module)
            self._weights.are_all_of(modules)
            self._all = None if self._examining else self._membership(modules)
            return
        self._unchanged = self._same_tensors
        if not self._unchanged:
            self._all = None
        if self._weights.resume(modules):
            self._entered.update(modules)
            for module in modules:
                if module._buffers:
                    self._enter_buffers(module)
        else:
            for module in modules:
                if module._parameters or module._buffers:
                    self._enter_tensors(module)
        for module in modules if not self._unchanged or self._written else self._volatile.intersection(modules):
            self._enter_attributes(module, unchanged=self._unchanged and module not in self._volatile)

    @property
    def _same_tensors(self) -> bool:
        return all(first.same_tensors for first in self._with_tensors)

    def _membership(self, modules: list[nn.Module]) -> Membership:
        parts = []
        for module in modules:
            first = self._first.get(module)
            if _is_script(module):
                continue
            if first is None or module in self._volatile:
                parts.append((module._parameters, module._parameters.copy()))
            else:
                parts += first.parts
        self._with_tensors = [first for first in self._first.values() if first.has_tensors]
        return Membership(parts)

    def enter(self, module: nn.Module) -> None:
        """Note what a module holds, before it runs; then let it hold what it held at first."""
        if module not in self._entered:  # it may write into those below it before they run
            below = list(module.modules())
            for each in below:
                self._enter_tensors(each)
            for each in below if self._examining else self._volatile.intersection(below):
                self._enter_attributes(each)
        self._enter_attributes(module)

    def _enter_attributes(self, module: nn.Module, *, unchanged: bool = False) -> None:
        if not (unchanged or _is_script(module)) and self._may_change(module):
            self._note_attributes(module)
        if self._resets and self._written:
            written = [name for name in self._written if name[0] is module]
            self.stale.update(name for name in written if self._is_stale(name))
            self._reset_buffers(written)

    def _is_stale(self, name: Name) -> bool:
        """Whether a buffer that forwards write holds another number than at first; not if it was moved elsewhere."""
        (module, key), first = name, self._first_buffers[name]
        now = module._buffers[key]
        return now is not None and alike(now, first.tensor) and (first.changed or not same_bits(now, first.tensor))

    def _note_attributes(self, module: nn.Module) -> None:
        if module in self._now:
            return
        volatile, first = module in self._volatile, self._first.get(module) if self._resets else None
        if first is not None and not self._examining and not volatile and first.same:
            self._now[module] = first
            return
        self._memory.update(address(p) for p in module.parameters())  # those of children that have not run yet, too
        held = Held(module, self._kept, self._memory)
        if first is None:
            self._first[module] = held  # before `_now`: what is put back afterwards is compared with it
        self._now[module] = held
        if first is None:
            return
        if self._left_behind(module, first):
            first.put_back_attributes()
            self._put_back_replaced_buffers(module)
        elif not first.same:
            self._first[module] = held

    def _enter_tensors(self, module: nn.Module) -> None:
        if module in self._entered:
            return
        self._entered.add(module)
        self._weights.note(module, copied=self._examining)
        self._enter_buffers(module)

    def _enter_buffers(self, module: nn.Module) -> None:
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                copy = Copied(buffer, bits=True)
                self._memory.add(address(buffer))
                self._buffers.append(((module, name), copy))
                self._first_buffers.setdefault((module, name), copy)

    def _left_behind(self, module: nn.Module, first: Held) -> bool:
        """Whether something has changed in this module that is no setting."""
        if module in self._volatile:
            return True
        names = [name for name, old, new in first.changes() if is_left_behind(old, new)]
        self.stale.update((module, name) for name in names)
        return bool(names)

    def _put_back_replaced_buffers(self, module: nn.Module) -> None:
        """Put back the buffers in whose place there are others, of the same kind: `Module.to` replaces them too."""
        for name, now in list(module._buffers.items()):
            first = self._first_buffers.get((module, name))
            if first is not None and now is not None and now is not first.tensor and alike(now, first.tensor):
                self._reset_buffers([(module, name)])

    def _reset_buffers(self, names: Iterable[Name]) -> None:
        for module, name in names:
            first = self._first_buffers[module, name]
            module._buffers[name] = first.tensor
            first.put_back()

    def reset(self) -> None:
        """Let every module hold what it held at first; before a further forward of the same reading."""
        self._weights.reset()
        if self._resets:
            for module in self._volatile.intersection(self._now):
                self._first[module].put_back_attributes()
            self._reset_buffers(self._written.intersection(name for name, _ in self._buffers))

    def leave(self) -> None:
        """Put everything back, and note what the reading has changed. What fails does not keep the rest from it."""
        failed: BaseException | None = None
        for put_back in self._everything():
            try:
                put_back()
            except BaseException as error:
                failed = error
        if failed is not None:
            raise failed
        self._now, self._buffers, self._kept = {}, [], set()  # at once: an interrupt begins `leave` again
        self._weights.rest()
        if self._examining:
            first = self._first.items()
            self._first = {m: held for m, held in first if m in self._volatile or keeps_state(m)}
        self._examining = self._unchanged = False

    def _may_change(self, module: nn.Module) -> bool:
        return self._examining or module in self._volatile or keeps_state(module)

    def _everything(self) -> Iterator[Callable[[], None]]:
        if self._unchanged and not (self._all is not None and self._all.same and self._same_tensors):
            self._now = {**self._first, **self._now}
        # Buffers first: what a module is made of, which ones it has included, is put back whole.
        yield from (partial(self._put_back_buffer, name, buffer) for name, buffer in self._buffers)
        yield from (partial(self._put_back, held) for held in self._now.values())
        yield from (partial(self._put_back_weight, weight) for weight in self._weights.touched())

    def refuse(self) -> None:
        """Refuse a model that cannot be measured without a trace.

        Raises:
            ValueError: the latest reading wrote what cannot be put back.
        """
        problems, self._problems = self._problems, []
        if problems:
            raise ValueError(f"a forward in eval mode leaves a trace that an audit cannot undo: {'; '.join(problems)}")

    def _put_back(self, held: Held) -> None:
        module = held.module
        if module not in self._volatile and any(True for _ in self._first[module].changes()):
            self._volatile.add(module)
            self.learned, self._all = True, None
        self._problems += [f"{type(module).__name__} {what}" for what in held.put_back()]

    def _put_back_buffer(self, name: Name, buffer: Copied) -> None:
        module, key = name
        now = module._buffers[key] if key in module._buffers else None  # noqa: SIM401 - TorchScript's have no `get`
        first = self._first_buffers[name]
        if not any(now is began.tensor and not began.changed for began in (buffer, first)):
            self.learned |= name not in self._written
            self._written.add(name)
        module._buffers[key] = buffer.tensor
        buffer.put_back()

    def _put_back_weight(self, weight: ReadWeight) -> None:
        known = self.writes(weight.parameter)
        self._problems += self._weights.put_back(weight)
        self.learned |= not known and self.writes(weight.parameter)


def _is_script(module: nn.Module) -> bool:
    """Whether it is TorchScript: no attributes of python, and always the same modules below it."""
    return isinstance(module, torch.jit.ScriptModule)
