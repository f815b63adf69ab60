"""One hypothesis profile, a machine that does not oversubscribe itself, and an order that can be shuffled."""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, settings

# Examples build small models: their time varies, and says nothing about correctness.
settings.register_profile(
    "step_optim",
    deadline=None,
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "25")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
)
settings.load_profile("step_optim")

THREADS = int(os.environ.get("STEP_OPTIM_TEST_THREADS", "1"))
"""Tiny models gain nothing from threads, and two threads on one core cost a lot; sums come out in another order."""

torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffle the files, and the tests in each of them, by the seed STEP_OPTIM_TEST_ORDER; a file stays together."""
    seed = os.environ.get("STEP_OPTIM_TEST_ORDER")
    if seed is None:
        return
    files: dict[object, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    shuffled = list(files.values())
    draw = random.Random(seed)
    draw.shuffle(shuffled)
    for tests in shuffled:
        draw.shuffle(tests)
    items[:] = [item for tests in shuffled for item in tests]
