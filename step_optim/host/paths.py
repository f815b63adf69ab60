"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | Path) -> Path:
    """Return a path with a leading ``~`` or ``~user`` spelt out; a name that only begins with a tilde stays."""
    return Path(os.path.expanduser(path))
