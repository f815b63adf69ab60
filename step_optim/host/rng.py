"""The random streams that a training loop may draw from."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
