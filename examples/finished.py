"""Runs that are finished, a JSON file each, so that a long experiment goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

R = TypeVar("R")


class Named(Protocol):
    """What tells one run from another."""

    @property
    def name(self) -> str:
        """Of its file."""


S = TypeVar("S", bound=Named)


def once(setting: Named, folder: Path, kind: Callable[..., R], do: Callable[[], R]) -> R:
    """Return what a run ended with; do it first if that is not known yet."""
    if (known := read(setting, folder, kind)) is not None:
        return known
    result: Any = do()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{setting.name}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    partial.replace(file)
    return result


def read(setting: Named, folder: Path, kind: Callable[..., R]) -> R | None:
    """Return what a run ended with; None if it was not done yet."""
    file = folder / f"{setting.name}.json"
    return kind(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def finished(settings: Iterable[S], folder: Path, kind: Callable[..., R]) -> dict[S, R]:
    """Return those of some runs that were done before."""
    found = {setting: read(setting, folder, kind) for setting in settings}
    return {setting: result for setting, result in found.items() if result is not None}
