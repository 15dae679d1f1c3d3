"""What a process knows of itself as a rank: the variables of torchrun or Slurm, and who started it."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys

from dsplugins.contracts import EnvironmentUnfit

LAUNCHER = "DSPLUGINS_LAUNCHER"
"""Environment variable that `dsplugins.launcher` sets for its ranks: its own process id."""
RUN = "DSPLUGINS_RUN"
"""Environment variable in which `dsplugins launch` tells ranks their run directory, before a recipe does."""
NODE_NUMBERS = ("SLURM_NODEID", "JOB_COMPLETION_INDEX")
"""Variables in which Slurm and Kubernetes tell a node its number."""


def inside_torchrun() -> bool:
    """Whether this process is a rank already, started by torchrun, by srun or by `dsplugins.launcher`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def number() -> int | None:
    """This process's rank, or None where it is none: in the launcher, for example."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def has_launcher() -> bool:
    """Whether `dsplugins.launcher` started this process, not torchrun."""
    return LAUNCHER in os.environ


def several_nodes() -> bool:
    """Whether other ranks of the run are on other machines."""
    world = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", world) != world


def adopt_srun() -> None:
    """Be the rank that srun made this process, where nobody else has made it one: RANK and the others.

    Only in a step of several tasks; a single task starts its ranks itself. Raises EnvironmentUnfit where the
    ranks couldn't find each other.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if inside_torchrun() or tasks == 1:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise EnvironmentUnfit(
            f"srun started {tasks} tasks, ranks of one run, without {' and '.join(missing)}: export "
            "the first node's name and a free port, as the script of `dsplugins launch --by srun` does; or "
            "srun --ntasks=1, and that task starts its ranks itself"
        )
    node = int(os.environ["SLURM_NODEID"])
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(_tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])[node]),
    }


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `8(x2),4` -> [8, 8, 4]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def refuse_doubled() -> None:
    """Raise EnvironmentUnfit where srun has started several torchruns on a node, each with all its ranks."""
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    agents = int(os.environ.get("GROUP_WORLD_SIZE", tasks))  # torchruns that know of each other
    if agents >= tasks:
        return
    nodes, ranks = int(os.environ["SLURM_STEP_NUM_NODES"]), int(os.environ["LOCAL_WORLD_SIZE"])
    raise EnvironmentUnfit(
        f"srun started {tasks} tasks on {nodes} node{'s' if nodes > 1 else ''}, and torchrun in each of them "
        f"{ranks} rank{'s' if ranks > 1 else ''}, so that there are {tasks * ranks} processes: "
        "srun --ntasks-per-node=1 for torchrun, or leave torchrun out and let the tasks be the ranks"
    )


def node_numbers() -> tuple[int, int] | None:
    """This node's number by torchrun and by the scheduler; None where one of them is unknown."""
    given = os.environ.get("GROUP_RANK")
    known = next((os.environ[name] for name in NODE_NUMBERS if name in os.environ), None)
    return None if given is None or known is None else (int(given), int(known))


def end_with_launcher() -> None:
    """From now on SIGTERM comes when the launcher is gone, even if that was killed (Linux: prctl(2)).

    Does nothing in a process that `dsplugins.launcher` didn't start.
    """
    if not has_launcher() or sys.platform != "linux":
        return
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != int(os.environ[LAUNCHER]):  # gone before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def leave_interrupts_to_launcher() -> None:
    """From now on Ctrl-C ends this process without a word of Python's, until the run listens to it.

    `dsplugins.launcher` tells of it once. Does nothing in a process that it didn't start.
    """
    if has_launcher() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
