"""Ranks on this machine: what they all need is asked for first, then they are started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dsplugins.contracts import Plan
    from dsplugins.launcher import Outcome
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe


def ready(recipe: Recipe, plan: Plan, plugins: Plugins) -> None:
    """Set what plugins need in the environment. Raises EnvironmentUnfit or RecipeError, before a process is
    started, for what the ranks would all stumble over here: variables, devices, memory, files.
    """
    from dsplugins import environment, process_group
    from dsplugins.contracts import RecipeError

    environment.provide(plugins)
    if lacking := process_group.lacking(plan, plugins, plan.run.world_size):
        raise RecipeError(recipe.located(lacking))


def started(plan: Plan, arguments: Sequence[str]) -> Outcome:
    """The outcome of `dsplugins ARGUMENTS` on `run.world_size` processes here."""
    from dsplugins.launcher import run_local

    processes = "1 process" if plan.run.world_size == 1 else f"{plan.run.world_size} processes"
    click.echo(f"starting {processes}: torch and megatron-core take some seconds", err=True)
    return run_local(plan.run.world_size, [*arguments])


__all__ = ["ready", "started"]
