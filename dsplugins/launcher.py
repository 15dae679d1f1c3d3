"""Local processes of a run, started as torchrun would start them, with their exit codes kept.

torchrun's own library (`torch.distributed.elastic`) is not used: it turns a stop into a `SignalException`
that drops the ranks' codes, kills a rank that still writes its checkpoint after 30 s, and costs an import
of torch (seconds) before anything starts.
"""

from __future__ import annotations

import ctypes
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

KNOWN_CAUSES = (3, 4)
"""Exit codes that a rank gives by itself, never because another one is gone: recipe, environment."""
STOPPED = 75
"""Exit code of a rank that stopped early, as it was asked to."""
ECHO = 2.0
"""Seconds that the other ranks have to end by themselves, and to say why, when one has failed."""
PARTING = 60.0
"""The same when one has stopped early: the others may still be writing their part of a checkpoint."""
GRACE = 20.0
"""Seconds between SIGTERM and SIGKILL for ranks that are left."""


def inside_torchrun() -> bool:
    """Whether this process is already a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_local(world_size: int, arguments: Sequence[str], command: Sequence[str] | None = None) -> int:
    """Run `python -m dsplugins ARGUMENTS` (or `command`) as `world_size` ranks on this machine.

    Returns 0 if all did; else the code that tells most: 3 or 4, then 128 + n of a rank that signal n
    killed, then any other of the rank that failed first; 75 if all that did not end with 0 stopped early.
    SIGTERM, SIGINT and SIGHUP are handed on; when one rank fails, all are ended. No restarts.
    """
    line = list(command) if command else [sys.executable, "-m", "dsplugins", *arguments]
    port = _free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    with _handed_on(ranks):
        try:
            for rank in range(world_size):
                ranks.append(_start(line, _environment(rank, world_size, port)))
            return _verdict(_watch(ranks))
        finally:
            for process in ranks:
                process.kill()


def _start(line: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """One rank, in a session of its own: Ctrl-C must reach it once, through us, not twice."""
    leash = _end_with_parent if sys.platform == "linux" else None
    return subprocess.Popen(line, env=environment, start_new_session=True, preexec_fn=leash)


def _end_with_parent() -> None:
    """Runs in the new process: SIGTERM when the launcher is gone, even if that was killed (prctl(2))."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


@contextmanager
def _handed_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Meanwhile, signals that ask this process to stop go to the ranks instead."""

    def forward(number: int, _: object) -> None:
        for process in ranks:
            process.send_signal(number)

    asked = [
        n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, forward) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(max(1, _cores() // world_size)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _cores() -> int:
    """Cores that this process may use, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class End:
    """How a rank ended."""

    code: int
    """As `subprocess` gives it: negative for a signal."""
    pressed: bool
    """Whether we had sent it a signal by then, because another one had ended."""


def _watch(ranks: Sequence[subprocess.Popen[bytes]]) -> list[End]:
    """The ends of all ranks, in the order in which they were seen. The first failure ends the others."""
    ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    for rank, process in enumerate(ranks):
        threading.Thread(target=_report, args=(rank, process, ended), daemon=True).start()
    ends: dict[int, End] = {}
    pressure, limit = signal.SIGTERM, math.inf
    while len(ends) < len(ranks):
        try:
            rank, code = ended.get(timeout=_seconds_until(limit))
        except queue.Empty:
            for rank, process in enumerate(ranks):
                if rank not in ends:
                    process.send_signal(pressure)
            pressure, limit = signal.SIGKILL, time.monotonic() + GRACE
            continue
        ends[rank] = End(code, pressed=pressure == signal.SIGKILL)
        if code and not ends[rank].pressed:
            limit = min(limit, time.monotonic() + (PARTING if code == STOPPED else ECHO))
            if code < 0:
                print(f"rank {rank} was killed by {_signal_name(-code)}", file=sys.stderr, flush=True)
    return list(ends.values())


def _report(rank: int, process: subprocess.Popen[bytes], ended: queue.SimpleQueue[tuple[int, int]]) -> None:
    ended.put((rank, process.wait()))


def _seconds_until(limit: float) -> float | None:
    return None if limit == math.inf else max(limit - time.monotonic(), 0.0)


def _verdict(ends: Sequence[End]) -> int:
    code = min((end for end in ends if end.code), key=_weight, default=End(0, False)).code
    return code if code >= 0 else 128 - code


def _weight(end: End) -> int:
    """Less for an end that is more of a cause: a rank whose peer is gone crashes too, and which of the two
    the kernel reports first is a matter of luck.
    """
    if end.code in KNOWN_CAUSES:
        return 0
    if end.code == STOPPED:
        return 4
    if end.pressed:
        return 3
    return 1 if end.code < 0 else 2


def _signal_name(number: int) -> str:
    hint = " (out of memory?)" if number == signal.SIGKILL else ""
    try:
        return signal.Signals(number).name + hint
    except ValueError:
        return f"signal {number}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
