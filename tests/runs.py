"""Runs of a tiny recipe inside a resident worker: what several tests look at."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

TINY = Path(__file__).parent / "tiny.yaml"


def trained(overrides: list[str], recipe: str = str(TINY)) -> dict:
    """Train in this worker's world; rows of `metrics.jsonl`, counts, and facts of the built model."""
    import torch
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    from dsplugins import train
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.rundir import RunDirectory
    from dsplugins.show import Display
    from dsplugins.testing import temporary_groups

    world = torch.distributed.get_world_size()
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(torch.distributed.get_rank())}
    # What core keeps for the whole process, in the shape of the first run.
    MTPLossLoggingHelper.tracker.clear()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    with tempfile.TemporaryDirectory() as folder, temporary_groups():
        loaded = Recipe.load(recipe, [*overrides, f"run.world_size={world}", "run.directory=unused"])
        plugins, plan = prepare(loaded)
        started = train.start_process_group
        train.start_process_group = lambda platform: torch.distributed.get_rank()
        try:
            run = train.Run(loaded, plan, plugins, RunDirectory(Path(folder)), Display(speaks=False))
            rows, counts = [], []
            done = consumed = 0
            while done < plan.train.steps:
                step, row = run._step(done, consumed)
                done, consumed = step.step, consumed + step.global_batch
                rows.append(row)
                counts.append(step.expert_counts.tolist() if step.expert_counts is not None else None)
            run._evaluate(done)
            evaluation = vars(run.evaluation)
        finally:
            train.start_process_group = started
    return {"rows": rows, "counts": counts, "evaluation": evaluation}
