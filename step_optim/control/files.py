"""The file that a control set is saved in: one JSON object of token ids, which needs no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from step_optim.host.paths import user_path

KEYS = ("prompts", "responses", "slices")


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write the lists of ids and the slices of a control set."""
    user_path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")


def read_record(path: str | Path) -> dict[str, Any]:
    """Return what `write_record` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no record of a control set; the message says what it lacks.
    """
    path = user_path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give the file that ControlSet.save wrote")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; give the one that ControlSet.save wrote")
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); give the file that ControlSet.save wrote") from error
    missing = [key for key in KEYS if not isinstance(record, dict) or key not in record]
    if missing:
        raise ValueError(f"{path} is no control set: it has no {missing}; give the file that ControlSet.save wrote")
    return dict(record)
