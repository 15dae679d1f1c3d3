"""The ranks of a run find each other, and make sure that they are about to do the same."""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.rundir import versions

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, Platform
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe


def right_world(plan: Plan) -> None:
    """Raise EnvironmentUnfit unless as many processes were started as the recipe is written for."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != plan.run.world_size:
        raise EnvironmentUnfit(
            f"{world} processes were started, the recipe is for run.world_size={plan.run.world_size}: "
            f"start {plan.run.world_size}, or set run.world_size={world}"
        )


def start(platform: Platform, plan: Plan) -> int:
    """Join the other ranks; a single process without torchrun makes a group of one. Returns the rank.

    A collective that a rank doesn't join within `run.timeout_minutes` fails on the others.

    A process group that is up already is used as it is: resident workers of tests train in theirs.
    """
    import torch

    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    limit = timedelta(minutes=plan.run.timeout_minutes)
    backend = platform.distributed_backend
    if "MASTER_ADDR" in os.environ:
        torch.distributed.init_process_group(backend, timeout=limit)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, timeout=limit, store=store, rank=0, world_size=1)
    return torch.distributed.get_rank()


def agree(recipe: Recipe, plugins: Plugins) -> None:
    """All ranks have the same recipe, plugins and versions, or none starts. Raises EnvironmentUnfit."""
    import torch

    mine = {
        "recipe": hashlib.sha256(recipe.resolved().encode()).hexdigest(),
        "plugins": plugins.digest(),
        "versions": str(sorted(versions().items())),
    }
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    for what in mine:
        others = [rank for rank, theirs in enumerate(everyone) if theirs[what] != everyone[0][what]]
        if others:
            shown = ", ".join(map(str, others[:8]))
            raise EnvironmentUnfit(
                f"ranks {shown} have other {what} than rank 0: install and start the same everywhere"
            )
