"""Runs of a tiny recipe inside a resident worker: what several tests look at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TINY = Path(__file__).parent / "tiny.yaml"
SEQUENTIAL = ["plugins.grouped=null", "plugins.sequential={}"]
"""Experts in turn, in the place of the grouped ones that recipes have."""


@contextlib.contextmanager
def assembled(overrides: list[str], recipe: str = str(TINY)) -> Iterator[Any]:
    """The assembly of a run in this worker's world; core's groups are gone afterwards."""
    import torch

    from dsplugins.assemble import assemble
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.testing import temporary_groups

    world = torch.distributed.get_world_size()
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(torch.distributed.get_rank())}
    given = ["run.directory=unused", *overrides, f"run.world_size={world}"]
    loaded = Recipe.load(recipe, given)
    plugins, plan = prepare(loaded)
    with temporary_groups():
        platform = plugins.slot("platform", plan=plan)
        yield assemble(loaded, plan, plugins, platform, platform.prepare(0))


def trained(overrides: list[str], recipe: str = str(TINY)) -> dict[str, Any]:
    """Train in this worker's world: rows of `metrics.jsonl`, expert counts, the evaluation at the end."""
    from dsplugins.evaluate import evaluate
    from dsplugins.step import Progress, take_step
    from dsplugins.train import as_row

    with assembled(overrides, recipe) as run:
        rows, counts, progress = [], [], Progress()
        while progress.steps < run.plan.train.steps:
            step = take_step(run, progress)
            progress = progress.after(step)
            rows.append(as_row(step, run.plan.data.seq_length))
            counts.append(step.expert_counts.tolist() if step.expert_counts is not None else None)
        found = evaluate(run, progress.steps)
    return {"rows": rows, "counts": counts, "evaluation": vars(found)}
