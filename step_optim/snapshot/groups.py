"""Group values (lr, betas, ...) that changed while somebody watched."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from step_optim.snapshot.tensors import TensorCopy

_MISSING = object()


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
        self._before, self._changes = [], {}

    def __enter__(self) -> None:
        self._before = [
            (group, {key: _saved(value) for key, value in group.items() if key != "params"})
            for group in self._optimizer.param_groups
        ]

    def __exit__(self, *_: object) -> None:
        self._note()

    def _note(self) -> None:
        for group, before in self._before:
            for key in (before.keys() | group.keys()) - {"params"}:
                saved = before.get(key, _MISSING)
                if not _same(saved, group.get(key, _MISSING)):
                    self._changes.setdefault((id(group), key), (group, saved))
        self._before = []

    def written(self) -> list[tuple[dict[str, Any], str]]:
        """The values that changed: (group, key)."""
        self._note()
        return [(group, key) for (_, key), (group, _) in self._changes.items()]

    def revert(self, *, but: Collection[int] = ()) -> None:
        """Put the changed values back; a value that was changed twice goes back to its first.

        Args:
            but: ids of groups that keep theirs.
        """
        self._note()  # an interrupt may have come before it was done
        for (place, key), (group, saved) in self._changes.items():
            if place in but:
                continue
            if saved is _MISSING:
                group.pop(key, None)
            elif isinstance(saved, TensorCopy):
                saved.restore()
                group[key] = saved.tensor
            else:
                group[key] = saved


def _saved(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = TensorCopy(value)
    copy.bits.copy_(copy.dense)
    return copy


def _same(saved: Any, now: Any) -> bool:
    if isinstance(saved, TensorCopy):
        return saved.tensor is now and saved.unchanged
    return saved is now or (type(saved) is type(now) and bool(saved == now))
