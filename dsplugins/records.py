"""Records of what a command measured: the numbers that the docs may quote, with what they depend on."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsplugins.rundir import versions
from dsplugins.sources import commit


def write(folder: Path, name: str, command: Sequence[str], results: Mapping[str, Any]) -> Path:
    """Write `folder/NAME.json`: date, hardware, command, versions and `results`; return its path.

    A record is written whole or not at all, and takes the place of an older one of the same name.
    """
    record = {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(command),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"{name}.json", folder / f"{name}.json.partial"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)
    return path


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, GPUs by name."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": _processor(), "cores": _cores(), "memory_gib": _memory(), "gpus": gpus}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


__all__ = ["hardware", "write"]
