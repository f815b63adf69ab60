"""The weights of pi_ref, kept so that it can be read on observations that come later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from step_optim.host.undo import undone

Place = tuple[nn.Module, str, str]
"""A module; ``"_parameters"`` or ``"_buffers"``; a name in there."""


class FirstPolicy:
    """Copies of the parameters and buffers of some modules.

    Args:
        modules: all that the policy is read from; those below them count only if they are among these.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> first = FirstPolicy([layer])
    >>> _ = nn.init.zeros_(layer.weight)
    >>> with first.standing_in():
    ...     bool(layer.weight.any())
    True
    >>> bool(layer.weight.any())
    False
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(dict.fromkeys(modules))
        self._places = list(_places(self.modules))
        copies: dict[int, Tensor] = {}  # a tied weight is kept once
        for place in self._places:
            held = _get(place)
            copies.setdefault(id(held), held.detach().clone())
        self._tensors = [copies[id(_get(place))] for place in self._places]

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let the modules hold these tensors in the place of their own."""
        own: list[tuple[Place, Tensor]] = []

        def put_back() -> None:
            for place, tensor in own:
                _set(place, tensor)

        with undone(put_back):
            for place, tensor in zip(self._places, self._tensors, strict=True):
                own.append((place, _get(place)))
                _set(place, tensor)
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, by their number."""
        return {str(i): tensor.clone() for i, tensor in enumerate(self._tensors)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: it is of other modules.
        """
        shapes = [tuple(tensor.shape) for tensor in self._tensors]
        saved = [state[str(i)] for i in range(len(state))]
        if [tuple(tensor.shape) for tensor in saved] != shapes:
            raise ValueError(
                f"the checkpoint's pi_ref has {len(saved)} tensors that are not those of the {len(shapes)} of the "
                "modules that fn calls; resume with the policy of the run that saved it"
            )
        self._tensors = [new.to(old).clone() for new, old in zip(saved, self._tensors, strict=True)]


def _places(modules: Iterable[nn.Module]) -> Iterator[Place]:
    for module in modules:
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(module, kind).items():
                if tensor is not None:
                    yield module, kind, name


def _get(place: Place) -> Tensor:
    module, kind, name = place
    tensor = getattr(module, kind)[name]
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _set(place: Place, tensor: Tensor) -> None:
    module, kind, name = place
    getattr(module, kind)[name] = tensor
