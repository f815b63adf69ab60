"""The parameters of the modules that a reading runs: where they are, whether it writes them, and how to undo that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from step_optim.snapshot.tensors import Memory, is_plain_memory, places, same_bits, versions


class ReadWeights:
    """The parameters of one reading's modules, as they were when it began.

    Notes of them are kept for the next reading, without the memory, which
    others may free: where all parameters still are in place, they serve again.
    """

    def __init__(self) -> None:
        self._noted: list[ReadWeight] = []
        self._kept: dict[int, ReadWeight] = {}
        """Of the latest reading, by the ids of their parameters."""
        self._modules: Sequence[nn.Module] | None = None
        """All of whose parameters were noted, and nobody else's."""
        self._resting: tuple[Sequence[nn.Module], list[ReadWeight], list[Tensor], object] | None = None
        self._rewritten: set[int] = set()
        self._moved: set[int] = set()
        self.addresses: set[int] = set()
        """Where the memory of the noted parameters begins."""

    def begin(self) -> None:
        """Begin a reading; an earlier one may have been given up."""
        self._noted, self._modules, self.addresses = [], None, set()

    def forget(self) -> None:
        """Keep no notes of the latest reading."""
        self._kept, self._resting = {}, None

    def note(self, module: nn.Module, *, copied: bool) -> None:
        """Note the parameters of a module that is about to run.

        Args:
            module: whose they are.
            copied: copy their bits in any case; else those are copied which forwards are known to write.
        """
        self._modules = None
        renormed = module._parameters and getattr(module, "max_norm", None) is not None
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            copy = bool(copied or renormed or id(parameter) in self._rewritten)
            weight = None if copy else self._kept.get(id(parameter))
            if weight is None or not weight.is_of(module, name):
                if not is_plain_memory(parameter):
                    continue
                weight = ReadWeight((module, name), parameter, copied=copy)
            weight.begin()
            self._noted.append(weight)
            self.addresses.add(weight.address)

    def are_all_of(self, modules: Sequence[nn.Module]) -> None:
        """Say that those noted so far are the parameters of these modules: see `resume`."""
        self._modules = modules

    def resume(self, modules: Sequence[nn.Module]) -> bool:
        """Note the parameters of these modules, which are the same tensors as in the latest reading.

        Returns:
            Whether the latest notes serve; if not, nothing is noted.
        """
        if self._resting is None or self._resting[0] is not modules:
            return False
        _, weights, parameters, where = self._resting
        if places(parameters) != where:
            return False
        for weight in weights:
            weight.begin()
        self._noted, self._modules = weights, modules
        self.addresses.update([weight.address for weight in weights])
        return True

    def writes(self, parameter: Tensor) -> bool:
        """Whether forwards write into a parameter, or give it other memory."""
        return id(parameter) in self._rewritten or id(parameter) in self._moved

    def reset(self) -> None:
        """Put back those that forwards write."""
        for weight in self._noted if self._rewritten or self._moved else ():
            if self.writes(weight.parameter):
                weight.put_back()

    def touched(self) -> Iterator[ReadWeight]:
        """Those that may be others than they were."""
        if self._resting is not None and self._resting[1] is self._noted:  # many at once
            _, weights, parameters, where = self._resting
            if versions(parameters) == [weight.version for weight in weights] and places(parameters) == where:
                return
        yield from (weight for weight in self._noted if not weight.is_untouched)

    def put_back(self, weight: ReadWeight) -> list[str]:
        """Put one back, and remember that it has to be; what cannot be, in words."""
        key, (module, name) = id(weight.parameter), weight.name
        moved, rewritten = weight.put_back()
        lost = rewritten and weight.bits is None and key not in self._rewritten
        self._moved |= {key} if moved else set()
        self._rewritten |= {key} if rewritten else set()
        return [f"{type(module).__name__} has written into its parameter {name!r} for the first time"] if lost else []

    def rest(self) -> None:
        """End the reading, and let memory go."""
        weights, modules = self._noted, self._modules
        for weight in weights:
            weight.rest()
        self._noted, self._modules = [], None
        if self._resting is not None and self._resting[1] is weights and modules is not None:
            return
        self._kept = {id(weight.parameter): weight for weight in weights if weight.bits is None}
        parameters = [weight.parameter for weight in weights]
        copied = any(weight.bits is not None for weight in weights)
        self._resting = None if modules is None or copied else (modules, weights, parameters, places(parameters))


class ReadWeight:
    """One parameter of a module that is about to run.

    Args:
        name: whose it is, and under which name.
        parameter: itself.
        copied: whether to copy its bits: to the host, since there may be no room beside a whole model.
    """

    __slots__ = ("_memory", "address", "bits", "name", "parameter", "version")

    def __init__(self, name: tuple[nn.Module, str], parameter: Tensor, *, copied: bool) -> None:
        self.name, self.parameter = name, parameter
        self._memory, self.version = Memory.of(parameter), parameter._version
        self.address = self._memory.address
        self.bits = parameter.detach().to("cpu", copy=True) if copied else None

    def is_of(self, module: nn.Module, name: str) -> bool:
        """Whether this is the parameter of that name, where it was."""
        return self.name == (module, name) and self._memory.is_of(self.parameter)

    def begin(self) -> None:
        """Note the parameter for a reading; it is where it was."""
        self._memory.hold(self.parameter)
        self.version = self.parameter._version

    def rest(self) -> None:
        """Let the memory go until the next reading."""
        self._memory.let_go()

    @property
    def is_untouched(self) -> bool:
        """Whether it is where it was, and nobody has written it, as far as that can be told without its bits."""
        parameter = self.parameter
        return self.bits is None and parameter._version == self.version and self._memory.is_of(parameter)

    def put_back(self) -> tuple[bool, bool]:
        """Let it be where it was, with the bits that it had, as far as they were copied.

        Returns:
            Whether it was somewhere else; whether what is in its memory was written.
        """
        parameter, moved = self.parameter, not self._memory.is_of(self.parameter)
        if moved:
            parameter.data = self._memory.tensor()
        if self.bits is None:
            return moved, not moved and parameter._version != self.version
        if not same_bits(parameter, self.bits.to(parameter.device)):
            with torch.no_grad():
                parameter.copy_(self.bits)
            return moved, True
        return moved, not moved and parameter._version != self.version  # perhaps other bits another time
