"""A control set of batches in a file: safetensors, which holds tensors and texts, and runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from step_optim.control.given import GivenBatch, checked_batches
from step_optim.control.slices import checked_slices
from step_optim.host.paths import user_path

KIND = "step_optim.control_batches"
"""The entry of the file's metadata that says what else there is to know."""


def write_batches(path: str | Path, batches: Sequence[GivenBatch], facts: Mapping[str, Any]) -> None:
    """Write batches, with facts that JSON can hold.

    Raises:
        ImportError: there is no safetensors.
    """
    tensors = {
        f"{number}/{name}": tensor.cpu().contiguous().clone()
        for number, batch in enumerate(batches)
        for name, tensor in {**batch.inputs, "labels": batch.labels}.items()
    }
    _safetensors().torch.save_file(tensors, user_path(path), metadata={KIND: json.dumps(dict(facts))})


def is_batches(path: str | Path) -> bool:
    """Whether a file is of this kind: a number of eight bytes begins it, with zeros that no JSON has."""
    path = user_path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"\0" in file.read(8)


def read_batches(path: str | Path, device: torch.device | str | None) -> dict[str, Any]:
    """Read what `write_batches` wrote: ``batches``, ``places``, ``slices`` and ``shift``.

    Raises:
        ImportError: there is no safetensors.
        ValueError: the file is of another kind, or damaged.
    """
    library = _safetensors()
    try:
        with library.safe_open(user_path(path), framework="pt", device="cpu") as file:
            facts = json.loads((file.metadata() or {})[KIND])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return _checked(facts, _by_batch(tensors, "cpu" if device is None else device))
    except (library.SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no valid control set ({type(error).__name__}: {error}); give the file that "
            "ControlSet.save wrote"
        ) from error


def _by_batch(tensors: Mapping[str, torch.Tensor], device: torch.device | str) -> list[dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition("/")
        found.setdefault(int(number), {})[name] = tensor.to(device)
    return [found[number] for number in range(len(found))]


def _checked(facts: Any, given: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    batches = checked_batches(given)
    places = [(int(number), int(row)) for number, row in facts["places"]]
    if any(row not in range(len(batches[number].labels)) for number, row in places) or not places:
        raise ValueError("its examples are rows that its batches do not have")
    slices = checked_slices(facts["slices"], len(places))
    return {"batches": batches, "places": places, "slices": slices, "shift": facts["shift"]}


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "a control set of batches is saved with safetensors, which is not installed: pip install safetensors"
        ) from error
    return safetensors
