"""Section "step": what one step costs under every method, in time and in memory; LoRA and full fine-tuning."""

from __future__ import annotations

from typing import Any

from bench import Bench
from measure import Figure, Timings, clean, interleaved, overhead, paired, peaks, ratio
from progress import Progress
from workload import Workload

PHASES = ("inner", "snapshot", "audit", "search")


def measure_steps(workload: Workload, rounds: int, progress: Progress) -> dict[str, Any]:
    """Both kinds of training."""
    found = {}
    for kind in ("lora", "full"):
        found[kind] = _measure(workload, kind, rounds, progress)
        clean(workload.device)
    return found


def _measure(workload: Workload, kind: str, rounds: int, progress: Progress) -> dict[str, Any]:
    progress.say(f"step, {kind}: building {workload.name}")
    bench = Bench(workload.model(kind), workload.batch(), workload.control())
    bench.calibrate()
    methods = bench.methods()
    memory = {}
    for method in (method for method in methods if not method.slow):
        if workload.device.type == "cuda":  # the first call of a kernel may keep memory for good
            method.prepare()
            method.run()
        memory[method.name] = peaks(method, workload.device)
    progress.say(f"step, {kind}: memory measured, the candidate moves {bench.moved:.3g} nats")
    timings = interleaved(methods, rounds, workload.device, lambda text: progress.say(f"step, {kind}: {text}"))
    return {
        "candidate_kl": bench.moved,
        "lr": bench.inner.param_groups[0]["lr"],
        "readout": bench.kl.readout,
        "kept": bench.kept,
        "methods": {name: _row(found, timings) | memory.get(name, {}) for name, found in timings.items()},
        "speedup": {how: _speedup(timings, how) for how in ("commit", "interpolate")},
    }


def _row(found: Timings, timings: dict[str, Timings]) -> dict[str, Any]:
    bare, forward = timings["bare"], timings["forward"]
    row: dict[str, Any] = {
        "seconds": vars(Figure.of(found.seconds)),
        "ratio": vars(ratio(found, bare)),
        "overhead": vars(overhead(found, bare, forward)),
        "raw": found.seconds,
    }
    row |= {name: vars(Figure.of(values)) for name, values in found.facts.items()}
    if "snapshot" in found.facts:
        parts = [a / b for a, b in zip(found.facts["snapshot"], bare.seconds, strict=False)]
        row["snapshot_of_bare"] = vars(Figure.of(parts))
    return row


def _speedup(timings: dict[str, Timings], how: str) -> dict[str, float]:
    """The overhead of naive over that of STEP, round by round."""
    naive, step = timings[f"naive {how}"], timings[f"STEP {how}"]
    return vars(paired(naive, step, timings["bare"], lambda a, b, bare: (a - bare) / max(b - bare, 1e-9)))
