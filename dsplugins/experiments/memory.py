"""What a rank of two holds, several ways: lasting state, and activations of a micro-batch, in bytes.

The quick start's model. Bytes are those of tensors, the same on any machine; nothing is timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECIPE = "deepseek_v3/tiny_cpu.yaml"
COMMON = ("train.global_batch=16", "run.directory=unused")
WAYS: Mapping[str, tuple[str, ...]] = {
    "the recipe as it is": (),
    "moments in BF16": ("plugins.adamw.moments=bf16",),
    "no ZeRO": ("plugins.adamw.zero=false",),
    "no expert parallelism": ("parallel.expert=1",),
    "tensor 2": ("parallel.expert=1", "parallel.tensor=2"),
    "half the micro-batch": ("train.micro_batch=2",),
    "up-projection recomputed": ("plugins.v3_recompute.norms=false",),
    "up-projection and norms recomputed": ("plugins.v3_recompute={}",),
    "FP8": ("plugins.bf16=null", "plugins.fp8_v3={}"),
    "FP8, up-projection and norms recomputed": (
        "plugins.bf16=null",
        "plugins.fp8_v3={}",
        "plugins.v3_recompute={}",
    ),
}
"""Way -> what it overrides in the recipe, after COMMON."""


def measure(way: str, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Bytes on rank 0 of a way, measured in processes of its own."""
    from dsplugins.launcher import run_local

    answer = folder / f"{way.replace(' ', '_')}.json"
    changes = [*COMMON, *overrides, *WAYS[way]]
    line = [sys.executable, "-m", "dsplugins.experiments.memory_rank", str(answer), RECIPE, *changes]
    outcome = run_local(2, (), line)
    if outcome.code:
        raise RuntimeError(f"{way}: {outcome.reason}")
    return {"way": way, **json.loads(answer.read_text())}


def results(measured: Sequence[Mapping[str, Any]], overrides: Sequence[str]) -> dict[str, Any]:
    """What goes into the record."""
    return {
        "recipe": RECIPE,
        "overrides": [*COMMON, *overrides],
        "ways": {way: " ".join(change) or "nothing" for way, change in WAYS.items()},
        "bytes": list(measured),
        "mebibytes": {
            row["way"]: {name: row[name] / 2**20 for name in row if name != "way"} for row in measured
        },
    }


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """The record as cells of text, sizes in MiB: a title, then a line for each way."""
    ways = found["mebibytes"]
    titles = [f"{name.replace('_', ' ').upper()}, MiB" for name in next(iter(ways.values()))]
    return [["WAY", *titles]] + [
        [way, *(f"{size:.3f}" for size in row.values())] for way, row in ways.items()
    ]
