"""Random generators and numpy arrays: their own state, and how it is put back."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor


class OwnState:
    """The state of a random generator or of a numpy array, which they carry themselves.

    Args:
        item: one of these; see `carries_state`.
    """

    def __init__(self, item: Any) -> None:
        self.item, self._saved = item, _own_state(item)

    @property
    def changed(self) -> bool:
        """Whether it is in another state."""
        return not _equal(self._saved, _own_state(self.item))

    def put_back(self) -> None:
        """Put it back into that state."""
        item, numpy = self.item, sys.modules.get("numpy")
        if isinstance(item, torch.Generator):
            item.set_state(self._saved)
        elif isinstance(item, random.Random):
            item.setstate(self._saved)
        elif numpy is not None and isinstance(item, numpy.random.Generator):
            item.bit_generator.state = self._saved
        else:
            sys.modules["numpy"].copyto(item, self._saved)


def carries_state(item: Any) -> bool:
    """Whether it is a random generator or a numpy array."""
    numpy = sys.modules.get("numpy")
    own = () if numpy is None else (numpy.random.Generator, numpy.ndarray)
    return isinstance(item, (torch.Generator, random.Random, *own))


def _own_state(item: Any) -> Any:
    if isinstance(item, torch.Generator):
        return item.get_state()
    if isinstance(item, random.Random):
        return item.getstate()
    return item.bit_generator.state if hasattr(item, "bit_generator") else item.copy()


def _equal(a: Any, b: Any) -> bool:
    """Whether two states are equal; those of numpy's generators hold arrays."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return bool(a.tobytes() == b.tobytes()) if hasattr(a, "tobytes") else bool(a == b)
