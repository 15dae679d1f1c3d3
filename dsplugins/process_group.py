"""The ranks of a run find each other, and make sure that they are about to do the same."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins import environment, rank
from dsplugins.contracts import EnvironmentUnfit
from dsplugins.rundir import versions

if TYPE_CHECKING:
    import torch

    from dsplugins.contracts import Plan, Platform, Problem
    from dsplugins.manager import Plugins
    from dsplugins.recipe import Recipe

Seen = tuple[str, bool, tuple[int, int] | None]
"""What a rank tells of its node: host name, whether it sees rank 0's file, its two numbers."""


def right_world(plan: Plan) -> None:
    """Raise EnvironmentUnfit unless as many processes were started as the recipe is written for."""
    rank.refuse_doubled()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != plan.run.world_size:
        raise EnvironmentUnfit(
            f"{world} processes were started, the recipe is for run.world_size={plan.run.world_size}: "
            f"start {plan.run.world_size}, or set run.world_size={world}"
        )


def lacking(plan: Plan, plugins: Plugins, processes: int) -> list[Problem]:
    """What this machine lacks for so many processes and for the plugins, as far as it shows without torch.

    One process is too many where there is no device at all.
    """
    platform: Platform = plugins.slot("platform", plan=plan)
    devices = list(platform.problems(1)) or list(platform.problems(processes))
    return [*devices, *missing(plan, plugins)]


def missing(plan: Plan, plugins: Plugins) -> list[Problem]:
    """What the plugins themselves miss here."""
    asked = plugins.event("ds_here", plan=plan)
    return [problem for _, found in asked for problem in found or ()]


def stand(plan: Plan, plugins: Plugins) -> tuple[Platform, torch.device]:
    """The platform of this process, and its device; what plugins need in the environment is there first.

    Raises EnvironmentUnfit where a variable has another value or can't be set any more, and where this
    machine lacks the device.
    """
    environment.provide(plugins)
    platform: Platform = plugins.slot("platform", plan=plan)
    return platform, platform.prepare(int(os.environ.get("LOCAL_RANK", "0")))


def start(platform: Platform, plan: Plan) -> int:
    """Join the other ranks; a single process without torchrun makes a group of one. Returns the rank.

    A collective that a rank doesn't join within `run.timeout_minutes` fails on the others. Raises
    EnvironmentUnfit if another process has the port on which rank 0 waits for the others.

    A process group that is up already is used as it is: resident workers of tests train in theirs.
    """
    import torch

    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    limit = timedelta(minutes=plan.run.timeout_minutes)
    backend = platform.distributed_backend
    if "MASTER_ADDR" in os.environ:
        try:
            torch.distributed.init_process_group(backend, timeout=limit)
        except torch.distributed.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise EnvironmentUnfit(
                f"port {os.environ['MASTER_PORT']} of {socket.gethostname()} is in use, by another run or "
                "by what is left of one: set MASTER_PORT to a free one"
            ) from error
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
            raise EnvironmentUnfit(
                f"ranks {_shown(others)} have other {what} than rank 0: install and start the same everywhere"
            )


def _shown(ranks: Sequence[int]) -> str:
    """The first few of them."""
    return ", ".join(map(str, ranks[:8])) + (" and more" if len(ranks) > 8 else "")


def nodes_fit(directory: Path) -> None:
    """The nodes of a run see the same `directory`, and are numbered as their scheduler numbers them.

    Collective. Raises EnvironmentUnfit on every rank. Does nothing where all ranks are on one machine.
    """
    if not rank.several_nodes():
        return
    mark = _mark(directory)
    everyone = _seen(mark)
    if rank.number() == 0:
        mark.unlink()
    _same_folder(directory, everyone)
    _same_order(everyone)


def nodes_see(file: Path) -> None:
    """As `nodes_fit`, by a `file` of a run that stands there: nothing is written."""
    if rank.several_nodes():
        everyone = _seen(file)
        _same_folder(file.parent, everyone)
        _same_order(everyone)


def _seen(file: Path) -> list[Seen]:
    """Of each rank: its host, whether it sees `file`, its node's numbers. Collective."""
    import torch

    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    mine = (socket.gethostname(), file.exists(), rank.node_numbers())
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _mark(directory: Path) -> Path:
    """A new file in rank 0's `directory`, told to all ranks. Raises EnvironmentUnfit if it can't be made."""
    import torch

    name = f".seen-{secrets.token_hex(8)}"
    told: list[str] = [name, ""]
    if rank.number() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / name).touch()
        except OSError as error:
            told[1] = f"run.directory {directory} can't be written by rank 0: {error.strerror}"
    torch.distributed.broadcast_object_list(told)
    if told[1]:
        raise EnvironmentUnfit(told[1])
    return directory / told[0]


def _same_folder(directory: Path, everyone: Sequence[Seen]) -> None:
    blind = [number for number, (_, sees, _) in enumerate(everyone) if not sees]
    if not blind:
        return
    hosts = ", ".join(dict.fromkeys(everyone[number][0] for number in blind[:8]))
    raise EnvironmentUnfit(
        f"run.directory {directory} is not the same folder everywhere: ranks {_shown(blind)} ({hosts}) "
        "don't see what rank 0 writes there: name one on storage that all nodes share, run.directory=..."
    )


def _same_order(everyone: Sequence[Seen]) -> None:
    numbers = dict.fromkeys(numbers for _, _, numbers in everyone if numbers)
    shuffled = {given for given, _ in numbers} == {
        known for _, known in numbers
    }  # else other things are meant
    moved = [f"node {known} is node {given} of torchrun" for given, known in numbers if given != known]
    if shuffled and moved:
        raise EnvironmentUnfit(
            f"nodes are shuffled, {', '.join(moved[:4])}: the rendezvous c10d numbers them by name, so "
            "that groups of ranks span distant nodes: give torchrun --node-rank, --master-addr and "
            "--master-port instead, as `dsplugins launch` writes them"
        )
