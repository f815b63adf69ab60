"""Files that are written whole or not at all."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"
"""Ends the name of a file that is being written; a killed process may leave one."""


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file, or leave what was there: it gets its name when all of it is written.

    Args:
        path: of the file. Its folder is made if it is not there.
        data: what it holds.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "new" / "file"
    >>> write_whole(path, b"whole"); path.read_bytes()
    b'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def check_writable(folder: Path, argument: str) -> None:
    """Make a folder, and refuse one in which no file can be written: now, and not after the first step.

    Args:
        folder: where files will be written.
        argument: names it in messages, with its value.

    Raises:
        ValueError: no file can be written there.

    >>> check_writable(Path("/proc/no/folder"), "folder='/proc/no/folder'")
    Traceback (most recent call last):
        ...
    ValueError: folder='/proc/no/folder': nothing can be written there (...); choose another place
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{argument}: nothing can be written there ({type(error).__name__}: {error}); choose another place"
        ) from error
