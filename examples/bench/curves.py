"""Section "curves": how the cost of a committed step grows with the control set, the vocabulary and the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench import ROOMY, Bench
from machine import free_bytes
from measure import Figure, clean, interleaved, overhead
from progress import Progress
from workload import Workload, padded_tokens, random_workload

from step_optim import ControlSet

PROMPTS = (8, 16, 32, 64, 128, 256)
VOCABULARIES = (8192, 32768, 65536, 131072, 151936)
BODY = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "inner": 768}
"""The small body under these vocabularies."""

CPU_SHAPES = (
    {"hidden": 192, "layers": 6, "heads": 3, "kv_heads": 3, "inner": 512, "vocab": 16384},
    {"hidden": 384, "layers": 8, "heads": 6, "kv_heads": 2, "inner": 1024, "vocab": 16384},
    {"hidden": 512, "layers": 16, "heads": 8, "kv_heads": 4, "inner": 1408, "vocab": 32768},
    {"hidden": 576, "layers": 30, "heads": 9, "kv_heads": 3, "inner": 1536, "vocab": 49152},
)
GPU_SHAPES = (
    {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 2, "inner": 2048, "vocab": 151936},
    {"hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "inner": 4864, "vocab": 151936},
    {"hidden": 1280, "layers": 28, "heads": 10, "kv_heads": 2, "inner": 6912, "vocab": 151936},
    {"hidden": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "inner": 8960, "vocab": 151936},
)
QUICK_SHAPES = (
    {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 64, "vocab": 512},
    {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 128, "vocab": 512},
)

ENOUGH = 60.0
"""Seconds at a point after which no further round begins."""

NAIVE_TENSORS = 6
"""Tensors of the size [C, T, V] in float32 that the naive audit holds at its worst."""


def measure_curves(workload: Workload, rounds: int, quick: bool, progress: Progress) -> dict[str, Any]:
    """The three curves, as lists of points."""
    rounds = min(rounds, 3)
    draw = _Curves(workload, rounds, progress)
    prompts, vocabularies, body = (
        (PROMPTS[:2], (512, 1024), QUICK_SHAPES[0]) if quick else (PROMPTS, VOCABULARIES, BODY)
    )
    shapes = GPU_SHAPES if workload.device.type == "cuda" else CPU_SHAPES
    return {
        "prompts": draw.over_prompts(prompts),
        "vocabulary": draw.over_shapes("vocabulary", [body | {"vocab": size} for size in vocabularies]),
        "parameters": draw.over_shapes("parameters", QUICK_SHAPES if quick else shapes),
    }


class _Curves:
    """Measures points; one that fails or finds no time or memory is left out, and said to be."""

    def __init__(self, workload: Workload, rounds: int, progress: Progress) -> None:
        self._workload, self._rounds, self._progress = workload, rounds, progress

    def over_prompts(self, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
        """The size of the control set, under the model of the run."""
        points = [
            self._point(f"{size} prompts", size, lambda size=size: (self._workload, self._workload.control(size)))
            for size in sizes
        ]
        return [point for point in points if point]

    def over_shapes(self, x: str, shapes: Sequence[dict[str, int]]) -> list[dict[str, Any]]:
        """Random models; ``x`` says which of their sizes it is about."""
        points = []
        for shape in shapes:
            what = f"{shape['layers']} layers of width {shape['hidden']}, vocabulary {shape['vocab']}"
            points.append(self._point(what, shape["vocab"] if x == "vocabulary" else 0, self._random(shape)))
        return [point for point in points if point]

    def _random(self, shape: dict[str, int]) -> Callable[[], tuple[Workload, ControlSet]]:
        def make() -> tuple[Workload, ControlSet]:
            made = random_workload("random", shape, self._workload.device, self._workload.dtype)
            return made, made.control(self._workload.prompts)

        return make

    def _point(self, what: str, x: int, make: Callable[[], tuple[Workload, ControlSet]]) -> dict[str, Any] | None:
        """One point; ``x`` 0 stands for the model's parameters."""
        if not self._progress.allows(f"curves, {what}"):
            return None
        try:
            found = self._measure(what, *make())
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._progress.skip(f"curves, {what}", type(error).__name__)
            return None
        finally:
            clean(self._workload.device)
        return found | {"x": x or found["parameters"]}

    def _measure(self, what: str, workload: Workload, control: ControlSet) -> dict[str, Any]:
        bench = Bench(workload.model("lora"), workload.batch(), control)
        methods = bench.few()
        needed = NAIVE_TENSORS * 4 * padded_tokens(control) * workload.vocab
        if needed < 0.8 * free_bytes(workload.device):
            methods.append(bench.naive("naive commit", ROOMY))
        else:
            self._progress.skip(f"curves, {what}, naive", f"it would take {needed / 1e9:.0f} GB")
        if workload.device.type == "cuda":
            interleaved(methods, 1, workload.device)  # kernels are loaded, and memory is found
        timings = interleaved(methods, self._rounds, workload.device, enough=ENOUGH)
        self._progress.say(f"curves: {what}")
        bare, forward = timings["bare"], timings["forward"]
        return {
            "parameters": sum(p.numel() for p in bench.model.parameters()),
            "seconds": {name: vars(Figure.of(found.seconds)) for name, found in timings.items()},
            "overhead": {
                name: vars(overhead(found, bare, forward))
                for name, found in timings.items()
                if name not in ("bare", "forward")
            },
        }
