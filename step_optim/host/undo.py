"""Interrupt-safe clean-up, wherever the interrupt arrives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.hooks import RemovableHandle

Undo = Callable[[], None]

ATTEMPTS = 5
"""How often an undo that fails (out of memory for a temporary, say) is begun again."""


class _Open(threading.local):
    """What is still to be undone in this thread, the innermost last."""

    def __init__(self) -> None:
        self.undos: list[Undo] = []
        self.failed: list[Undo] = []


_open = _Open()


def depth() -> int:
    """Return how much there is to undo now; for `finish`."""
    return len(_open.undos)


def finish(depth: int) -> None:
    """Undo what was opened since there was this much to undo.

    What fails does not keep the rest from being undone. It is tried once more
    by the next call, since it may have been interrupted before it began, and
    then given up.
    """
    error: BaseException | None = None
    for undo in reversed(_open.undos[depth:]):
        try:
            uninterrupted(undo)
            _open.undos.remove(undo)
        except BaseException as failure:
            error = failure
            if undo in _open.failed:
                _open.undos.remove(undo)
                _open.failed.remove(undo)
            else:
                _open.failed.append(undo)
    if error is not None:
        raise error


@contextmanager
def undone(undo: Undo) -> Iterator[None]:
    """Undo afterwards what the body does.

    An interrupt may hit a context manager on its way out, before it has begun
    to clean up; python then cleans up when it collects the garbage, which may
    be never. So a step ends by finishing whatever is still open in it, and
    nothing is undone later than that.

    Args:
        undo: may be called before there is anything to undo, and again afterwards.
    """
    _open.undos.append(undo)
    try:
        yield
    finally:
        if undo in _open.undos:
            finish(_open.undos.index(undo))


@contextmanager
def inserted(hook: Callable[..., Any], hooks: dict[int, Any]) -> Iterator[None]:
    """Have a hook of `torch.nn` in its dictionary during the body, and certainly not afterwards."""
    handle = RemovableHandle(hooks)  # known before there is a hook that it removes
    with undone(handle.remove):
        hooks[handle.id] = hook
        yield


def uninterrupted(undo: Undo) -> None:
    """Run an undo to its end; what interrupts it begins it again, and is raised when it is done."""
    interrupt: BaseException | None = None
    for _ in range(ATTEMPTS):
        try:
            undo()
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
