"""A tiny model as the loop builds it, for jobs of resident workers."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

TINY = Path(__file__).parent / "tiny.yaml"


@contextlib.contextmanager
def tiny_model(*overrides, recipe=TINY):
    """(plan, settings, plugins, bare chunks with initial weights) in this worker's world."""
    import torch

    from dsplugins import model, settings, weights
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.testing import temporary_groups

    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    loaded = Recipe.load(recipe, [*overrides, f"run.world_size={torch.distributed.get_world_size()}"])
    plugins, plan = prepare(loaded)
    settled = settings.settle(plan, plugins, loaded)
    with temporary_groups():
        model.start_groups(plan.layout, plan.train.seed)
        chunks = model.build_chunks(plan, settled, plugins)
        weights.initialise(chunks, plan.train.seed, settled.model.init_method_std)
        yield plan, settled, plugins, chunks
