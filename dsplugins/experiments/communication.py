"""What each layout of two processes sends in a step: counted in real runs, beside what was predicted.

The quick start's model (`deepseek_v3/tiny_cpu.yaml`), a few steps of each layout with the event
`bytes_on_wire`. Bytes are those of the model, whatever machine it runs on; seconds are not, and none are kept
but for the counted steps beside the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dsplugins.experiments.runs import Run, metrics

RECIPE = "deepseek_v3/tiny_cpu.yaml"
COMMON = (
    *("plugins.bytes_on_wire={every: 2}", "plugins.expert_load=null", "plugins.curves=null"),
    *("evaluate.every=0", "evaluate.sequences=0", "save.at_end=false"),
    *("train.global_batch=16", "plugins.aux_free.sequence_loss=0.0", "parallel.expert=1"),
)
"""In all runs: every other step is counted, and nothing happens but steps."""
LATE = ("plugins.adamw.overlap_grad_reduce=true", "plugins.adamw.overlap_param_gather=true")
INTERLEAVED = ("plugins.one_f_one_b=null", "plugins.interleaved={}", "parallel.virtual_pipeline=2")
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "data 2": (),
    "data 2, overlapped": LATE,
    "data 2, no ZeRO": ("plugins.adamw.zero=false",),
    "expert 2, alltoall": ("parallel.expert=2",),
    "expert 2, fp8_alltoall": ("parallel.expert=2", "plugins.alltoall=null", "plugins.fp8_alltoall={}"),
    "expert 2, allgather": ("parallel.expert=2", "plugins.alltoall=null", "plugins.allgather={}"),
    "tensor 2": ("parallel.tensor=2",),
    "pipeline 2": ("parallel.pipeline=2",),
    "pipeline 2, interleaved": ("parallel.pipeline=2", *INTERLEAVED),
}
"""Layout -> what it overrides in the recipe, after COMMON."""


def runs(steps: int, overrides: Sequence[str] = ()) -> Iterator[tuple[str, Run]]:
    """(layout, run); `overrides` come before what the layouts differ in."""
    for layout, change in LAYOUTS.items():
        name = layout.replace(", ", "_").replace(" ", "_")
        yield layout, Run(name, RECIPE, (*COMMON, *overrides, f"train.steps={steps}", *change))


def measure(layout: str, directory: Path) -> dict[str, Any]:
    """The table of a complete run, and seconds of its counted steps beside the others."""
    table = json.loads((directory / "bytes_on_wire.json").read_text())
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for row in metrics(directory)[1:]:  # the first step is slow for other reasons
        seconds["wire_bytes" in row].append(row["step_seconds"])
    counted, others = (median(seconds[way]) for way in (True, False))
    return {
        "layout": layout,
        **table,
        "step_seconds": {"counted": round(counted, 4), "others": round(others, 4)},
        "counted_over_others": round(counted / others, 3),
    }


def results(measured: Sequence[Mapping[str, Any]], steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    """What goes into the record."""
    rows = [row for run in measured for row in run["rows"]]
    told = [row for row in rows if row["predicted"] is not None]
    return {
        "holds": all(row["payload"] == row["predicted"] for row in told),
        "rows": len(rows),
        "rows_predicted": len(told),
        "counted_over_others": round(median(run["counted_over_others"] for run in measured), 3),
        "recipe": RECIPE,
        "overrides": [*COMMON, *overrides],
        "layouts": {layout: " ".join(change) or "the recipe as it is" for layout, change in LAYOUTS.items()},
        "steps": steps,
        "runs": list(measured),
    }


def table(found: Mapping[str, Any], least: int = 1000) -> list[list[str]]:
    """The record's rows of at least so many bytes as cells of text: a title, then one line for each."""
    cells = [["layout", "collective", "group", "calls", "payload", "predicted", "sent by a rank"]]
    for run in found["runs"]:
        for row in run["rows"]:
            if max(row["payload"], row["predicted"] or 0) < least:
                continue
            told = "not predicted" if row["predicted"] is None else _whole(row["predicted"])
            bytes_ = [_whole(row["payload"]), told, _whole(row["sent"])]
            cells.append([run["layout"], row["kind"], row["group"], f"{row['calls']:g}", *bytes_])
    return cells


def _whole(number: float) -> str:
    return f"{number:,.0f}"
