"""Local processes of a run, started by torchrun's own library, with their exit codes kept."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

GRACE = 20.0
"""Seconds between SIGTERM and SIGKILL for ranks that are left when one has failed."""


def inside_torchrun() -> bool:
    """Whether this process is already a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_local(world_size: int, arguments: Sequence[str], command: Sequence[str] | None = None) -> int:
    """Run `python -m dsplugins ARGUMENTS` (or `command`) as `world_size` ranks; their first bad code, or 0.

    torchrun turns every code into 1, so the ranks are started as its static rendezvous would start
    them: the same environment variables, one port, no restarts.
    """
    line = list(command) if command else [sys.executable, "-m", "dsplugins", *arguments]
    port = _free_port()
    ranks = [subprocess.Popen(line, env=_environment(rank, world_size, port)) for rank in range(world_size)]

    def forward(number: int, _: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _wait(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // world_size)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended; the first failure ends the others."""
    while True:
        codes = [process.poll() for process in ranks]
        bad = next((code for code in codes if code), None)
        if bad is not None:
            _end(ranks)
            return bad if bad > 0 else 128 - bad
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Give the others a moment to say the same thing, then end them."""
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline and any(p.poll() is None for p in ranks):
        time.sleep(0.05)
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE
    for process in ranks:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
