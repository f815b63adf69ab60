"""What is shown while responses are drawn, which takes seconds each on a slow machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from step_optim.control.listing import shown

Progress = bool | Callable[[int, int], object] | None
"""None: a bar, on terminals only; False: nothing; True: a bar; or a function, called with (done, total)."""

Item = TypeVar("Item")


def reported(items: Sequence[Item], progress: Progress) -> Iterable[Item]:
    """Return the items, one at a time, and report after each of them how many are done.

    >>> for prompt in reported(["a", "b"], lambda done, total: print(f"{done} of {total}")):
    ...     print(prompt)
    a
    1 of 2
    b
    2 of 2

    Raises:
        TypeError: ``progress`` is none of its four forms.
        ImportError: it is True, and there is no tqdm.
    """
    if progress is False:
        return items
    if progress is None or progress is True:
        return _with_bar(items, always=progress is True)
    if callable(progress):
        return _told(items, progress)
    raise TypeError(f"progress={shown(progress)} is none of None, True, False and a function of (done, total)")


def _told(items: Sequence[Item], tell: Callable[[int, int], object]) -> Iterator[Item]:
    for done, item in enumerate(items, 1):
        yield item
        tell(done, len(items))


def _with_bar(items: Sequence[Item], *, always: bool) -> Iterable[Item]:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as error:
        if always:
            raise ImportError("progress=True shows a bar of tqdm; pip install tqdm, or give a function") from error
        return items
    bar: Iterable[Item] = tqdm(items, desc="responses", disable=False if always else None)
    return bar
