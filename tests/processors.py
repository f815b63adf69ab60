"""Run the tests as other processors would: ``python -m tests.processors [--seed N] [arguments of pytest]``.

A run for each capability and for 1 and 2 threads, in random order and with random examples, and one line for each run.
A capability decides in which order a kernel adds, hence how a figure is rounded. That of torch's own kernels is taken
from ATEN_CPU_CAPABILITY, that of the matrix products from the libraries' own variables. More than the processor has
cannot be tried; every other processor has kernels of its own still.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

CAPABILITIES: Mapping[str, Mapping[str, str]] = {
    "default": {"MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {},
}
"""From the least to the most, each with what keeps MKL and oneDNN to it."""

THREADS = (1, 2)
COMPILED = Path(__file__).parent.parent / ".cache" / "compiled"
"""What torch.compile keeps, a folder for each capability: what it has compiled for one fails to compile for another."""


def has(best: str, capability: str) -> bool:
    """Whether a processor whose best capability this is has that one; all have the default."""
    order = list(CAPABILITIES)
    return capability == "default" or (best in order and order.index(capability) <= order.index(best))


def environment(capability: str, threads: int, seed: int) -> dict[str, str]:
    """The variables of a run."""
    own = {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(threads)}
    tests = {"STEP_OPTIM_TEST_THREADS": str(threads), "STEP_OPTIM_TEST_ORDER": str(seed)}
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED / capability)}
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}  # which would fix the examples
    return inherited | CAPABILITIES[capability] | own | tests | compiled


def run(capability: str, threads: int, seed: int, arguments: Sequence[str]) -> bool:
    """Run the tests once and print what came of it; whether they passed."""
    command = [sys.executable, "-m", "pytest", "-m", "not slow", f"--hypothesis-seed={seed}", *arguments]
    done = subprocess.run(
        command, env=environment(capability, threads, seed), capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).splitlines()
    outcome = lines[-1].strip("= ") if lines else f"exit code {done.returncode}"
    print(f"{capability}, threads {threads}, seed {seed}: {outcome}", flush=True)
    if done.returncode:
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        print(*(failures or lines[-20:]), sep="\n", flush=True)
    return done.returncode == 0


def main() -> int:
    """Run them all; 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.processors", description=__doc__)
    parser.add_argument("--seed", type=int, help="of order and examples in the first run (default: drawn)")
    options, arguments = parser.parse_known_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    best = torch.backends.cpu.get_cpu_capability().lower()
    passed = True
    for capability in CAPABILITIES:
        if not has(best, capability):
            print(f"{capability}: skipped, this processor has {best} at most", flush=True)
            continue
        for threads in THREADS:
            passed = run(capability, threads, seed, arguments) and passed
            seed += 1
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
