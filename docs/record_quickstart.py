"""Runs the quick start and keeps what it printed: `python docs/record_quickstart.py`.

Writes docs/records/tiny_cpu.json, which README.md and docs/first-run.md quote, and the pictures that they
show, docs/images/*.png. A finished run of the recipe in runs/tiny_cpu is started over.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dsplugins import records

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ("bash", "launch/quickstart.sh")
RUN = ROOT / "runs" / "tiny_cpu"
PICTURES = ("losses", "expert_load_over_time")


def main() -> None:
    load, began = os.getloadavg()[0], time.time()
    printed = run()
    results = {
        "seconds": round(time.time() - began),
        "load_average_before": round(load, 1),
        **ending(),
        "printed": printed,
    }
    print(f"wrote {records.write(ROOT / 'docs' / 'records', 'tiny_cpu', COMMAND, results)}")
    for name in PICTURES:
        keep_picture(name)


def run() -> list[str]:
    """The lines that the run wrote to stdout, from its first on; they are shown as they come."""
    process = subprocess.Popen([*COMMAND, "--fresh"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    if process.wait():
        sys.exit(f"the quick start ended with exit code {process.returncode}: nothing was recorded")
    first = next(number for number, line in enumerate(lines) if line.startswith("dsplugins: "))
    return lines[first:]


def ending() -> dict[str, Any]:
    """What the run directory says of the run as a whole, and its last step."""
    end = json.loads((RUN / "run.json").read_text())
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for key, value in rows[-1].items() if not isinstance(value, list)}
    kept = ("evaluation", "baselines", "completion", "peak_memory")
    return {"steps": len(rows), **{key: end[key] for key in kept}, "last_step": last}


def keep_picture(name: str) -> None:
    """A plot as a small file: 128 colours are enough for it."""
    from PIL import Image

    with Image.open(RUN / "plots" / f"{name}.png") as plot:
        plot.convert("RGB").quantize(128).save(ROOT / "docs" / "images" / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
