"""Other tensors in the place of parameters, for the time of a reading: the parameters themselves are not written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from step_optim.host.undo import undone


@contextmanager
def standing_in(
    modules: Iterable[nn.Module], tensors: Mapping[int, Tensor]
) -> Iterator[Mapping[int, Mapping[str, Any]]]:
    """Let modules hold other tensors in the place of their parameters; gradients reach these.

    Args:
        modules: that hold the parameters themselves; their children are not looked through.
        tensors: what stands in, by the id of the parameter; a tied one is replaced wherever it is.

    Yields:
        The own parameters of every module that holds a stand-in, by the id of the module; empty afterwards.
    """
    holders = list(modules) if tensors else []
    originals: dict[int, Mapping[str, Any]] = {}

    def put_back() -> None:
        for module in holders:
            _hold(module, originals.get(id(module), {}))
        originals.clear()

    with undone(put_back):
        for module in holders:
            mine = dict(module._parameters)
            others = {name: tensors[id(p)] for name, p in mine.items() if id(p) in tensors}
            if others:
                originals[id(module)] = mine  # known before any is replaced
                _hold(module, others)
        yield originals


def _hold(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():  # TorchScript's parameters have no update()
        module._parameters[name] = tensor
