"""What a process knows of itself as a rank: torchrun's environment variables, and who started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER = "DSPLUGINS_LAUNCHER"
"""Environment variable that `dsplugins.launcher` sets for its ranks: its own process id."""


def inside_torchrun() -> bool:
    """Whether this process is a rank already, started by torchrun or by `dsplugins.launcher`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def number() -> int | None:
    """This process's rank, or None where it is none: in the launcher, for example."""
    return int(os.environ["RANK"]) if "RANK" in os.environ else None


def has_launcher() -> bool:
    """Whether `dsplugins.launcher` started this process, not torchrun."""
    return LAUNCHER in os.environ


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
