"""What a run was made on."""

from __future__ import annotations

import datetime
import os
import platform
import re
from pathlib import Path

import torch


def processor() -> str:
    """The CPU's name, as far as it is known."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def slug(device: torch.device) -> str:
    """What the files of a run are called: cpu, or the GPU's name."""
    name = device_name(device) if device.type == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The lines at the top of a report."""
    import peft
    import transformers

    threads = f", threads: {torch.get_num_threads()} on {os.cpu_count()} cores" if device.type == "cpu" else ""
    return {
        "device": device_name(device) + threads,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}",
        "dtype": str(dtype).removeprefix("torch."),
        "date": datetime.date.today().isoformat(),
    }


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else 8 << 30
