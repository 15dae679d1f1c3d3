"""One run at a time in a directory: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dsplugins.contracts import EnvironmentUnfit

LOCK = "lock"
"""File that a run holds while it lasts; what is in it is for people."""
LEASE = 120.0
"""Seconds that a file server may keep the lock of a machine that is gone; NFS 4 has a lease of 90."""


class Occupied(EnvironmentUnfit):
    """Another run is under way in this directory: nothing there may be written, `status.json` neither."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else runs in `folder` meanwhile.

    Raises Occupied while somebody does: at once if that is a process of this machine, else after `LEASE`, for
    it may be gone. Where the file system has no locks nobody is refused; `RunDirectory.log` then notices.
    """
    with (folder / LOCK).open("a+") as file:
        try:
            _lock(file, folder)
        except OSError:
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield


def _lock(file: TextIO, folder: Path) -> None:
    """Take it, or raise Occupied; OSError where there are no locks."""
    deadline: float | None = None
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read() or "another process"
            elsewhere = not holder.endswith(f" of {socket.gethostname()}")
            if deadline is None:
                deadline = time.monotonic() + LEASE * elsewhere
                if elsewhere:
                    print(_waiting(folder, holder), file=sys.stderr, flush=True)
            if time.monotonic() >= deadline:
                raise _occupied(folder, holder, elsewhere) from error
        time.sleep(min(1.0, LEASE / 4))


def _waiting(folder: Path, holder: str) -> str:
    return (
        f"{folder} is held by {holder}; if that machine is gone, its lock ends within {LEASE:.0f} s: waiting"
    )


def _occupied(folder: Path, holder: str, elsewhere: bool) -> Occupied:
    said = f"a run is under way in {folder}, by {holder}: stop that one, or name another run.directory"
    return Occupied(
        said + (f"; if that machine is gone for good, remove {folder / LOCK}" if elsewhere else "")
    )


__all__ = ["LEASE", "LOCK", "Occupied", "held"]
