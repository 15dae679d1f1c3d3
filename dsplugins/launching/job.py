"""What the templates are filled with: a recipe's run, cut into nodes."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import TYPE_CHECKING

from dsplugins import environment
from dsplugins.contracts import Problem, RecipeError

if TYPE_CHECKING:
    from dsplugins.contracts import Plan
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe

LONGEST_NAME = 40
"""Characters of a job's name: Kubernetes makes host names of 63 from it."""


@dataclass(frozen=True)
class Cluster:
    """What the command line says of the machines."""

    nodes: int
    processes: int | None = None
    """Ranks on each; None: `run.world_size` / `nodes`."""
    grace: int = 300
    """Seconds between the request to stop and the end: time to save."""
    retries: int = 3
    """Further starts after a crash; a stop with code 75 is none."""
    partition: str = ""
    account: str = ""
    time: str = ""
    """Slurm's time limit, such as `24:00:00`."""
    image: str = ""
    """Container image."""
    shared: str = ""
    """Folder that all nodes share, as they see it."""
    claim: str = ""
    """Kubernetes: the volume claim behind `shared`."""
    namespace: str = ""


@dataclass(frozen=True)
class Job:
    """A run as a scheduler's job."""

    name: str
    """The recipe's, as `job_name` makes it one."""
    cluster: Cluster
    processes: int
    """Ranks on each node."""
    gpus: int
    """GPUs of each node; 0 on the platform cpu."""
    python: str
    """The interpreter on the nodes: this one, or the image's."""
    folder: str
    """Where the ranks start: relative paths of the recipe count from here."""
    run_directory: str
    train: tuple[str, ...]
    """Arguments of `python`, or of torchrun: `-m dsplugins train [OPTION] RECIPE KEY=VALUE ...`."""
    environment: dict[str, str] = field(default_factory=dict)
    """What the recipe's plugins need."""


def job(recipe: Recipe, plugins: Plugins, plan: Plan, cluster: Cluster, arguments: Sequence[str]) -> Job:
    """The run of `plan` on `cluster`; `arguments` are those of `dsplugins train`.

    Raises RecipeError where nodes and processes don't come to `run.world_size`, or where the run would be
    kept inside a container.
    """
    processes = _processes(recipe, plan, cluster)
    _refuse_what_ends_with_the_container(recipe, plan, cluster)
    platform = plugins.slot("platform", plan=plan)
    inside = bool(cluster.image)
    return Job(
        name=job_name(plan.name),
        cluster=cluster,
        processes=processes,
        gpus=processes if platform.device_type == "cuda" else 0,
        python="python" if inside else sys.executable,
        folder=cluster.shared if inside else str(Path.cwd()),
        run_directory=plan.run.directory,
        train=("-m", "dsplugins", "train", *arguments),
        environment=environment.needed(plugins),
    )


def job_name(recipe: str) -> str:
    """A recipe's name as every scheduler takes it: a label of DNS (RFC 1035), which begins with a letter."""
    words = re.findall(r"[a-z0-9]+", recipe.lower())
    if not words or words[0][0].isdigit():
        words = ["run", *words]
    return "-".join(words)[:LONGEST_NAME].rstrip("-")


def _processes(recipe: Recipe, plan: Plan, cluster: Cluster) -> int:
    world, nodes = plan.run.world_size, cluster.nodes
    if cluster.processes is None and world % nodes == 0:
        return world // nodes
    if cluster.processes is not None and cluster.processes * nodes == world:
        return cluster.processes
    if cluster.processes is None:
        said = f"run.world_size={world} can't be shared out evenly among {nodes} nodes"
        remedy = f"use a number of nodes that divides {world}, or change run.world_size"
    else:
        started = cluster.processes * nodes
        said = f"{nodes} nodes of {cluster.processes} processes are {started}, but run.world_size={world}"
        remedy = f"set run.world_size={started}, or start {world} processes"
    raise RecipeError(recipe.located([Problem(said, "run.world_size", remedy)]))


def _refuse_what_ends_with_the_container(recipe: Recipe, plan: Plan, cluster: Cluster) -> None:
    if not cluster.image:
        return
    there = PurePosixPath(normpath(PurePosixPath(cluster.shared or "/", plan.run.directory)))
    if cluster.shared and there.is_relative_to(normpath(cluster.shared)):
        return
    said = f"run.directory={plan.run.directory} lies inside the container, and ends with it"
    remedy = (
        f"name a folder below --shared, {cluster.shared}"
        if cluster.shared
        else "mount the folder that it belongs in with --shared"
    )
    raise RecipeError(recipe.located([Problem(said, "run.directory", remedy)]))


__all__ = ["Cluster", "Job", "job", "job_name"]
