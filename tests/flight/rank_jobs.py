"""What the processes of `test_distributed` do. A job returns plain values: they travel between processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from step_optim.flight import FlightRecorder, read_flight
from tests.hosts.rank_training import Training, story


def own_folder(folder: str) -> Path:
    """A folder that this process alone can see: the first one's has the steps."""
    return Path(folder) / f"rank{dist.get_rank()}"


def look_back(folder: str, *, look: bool, **options: Any) -> dict[str, Any]:
    """Train, measure the latest kept step again and take it apart, and train on."""
    recorder = FlightRecorder(own_folder(folder), when="always")
    run = Training("ddp", own=True, recorder=recorder, **options)
    for step in range(3):
        run.step(step)
    found: dict[str, Any] = {}
    if look:
        before = run.picture()
        record = run.optimizer.remeasure(None, [0.0, 0.5, 1.0])
        found = {"record": story(record), "parts": run.optimizer.attribute(by="module", audits=2).to_dict()}
        assert run.picture() == before
    for step in range(3, 5):
        run.step(step)
    kept = [kept.step for kept in read_flight(recorder.folder)]
    return found | {"weights": run.weights(), "last": story(run.optimizer.last), "kept": kept}


def fails_in_the_first(folder: str) -> list[str]:
    """Nothing was kept, which the first process alone knows; then train on."""
    run = Training("ddp", budget=1e-3, recorder=FlightRecorder(own_folder(folder)))
    told = []
    for call in (lambda: run.optimizer.remeasure(None, [0.5]), run.optimizer.attribute):
        try:
            call()
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    run.step(0)
    return told


def splits(folder: str) -> str:
    """FSDP2 has split the weights."""
    try:
        Training("fsdp", budget=1e-3, recorder=folder)
    except ValueError as error:
        return str(error)
    return ""
