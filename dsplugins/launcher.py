"""Local processes of a run, on torchrun's own process library, with their exit codes kept.

`torch.distributed.elastic.multiprocessing` starts the ranks, each in a session of its own, keeps every exit
code, and ends them: SIGTERM, some time, SIGKILL. The elastic agent above it, which is torchrun, replaces the
codes by 1. Two things are done here because the library does them otherwise: it answers a signal by raising
wherever the launcher happens to be, which can lose a rank or its code, and it ends all ranks as soon as one
has failed, before they have said why or finished a checkpoint.
"""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException, SubprocessContext
from torch.distributed.elastic.utils.distributed import get_free_port

from dsplugins.rank import LAUNCHER
from dsplugins.rundir import STOPPED

KNOWN_CAUSES = (3, 4)
"""Exit codes that a rank gives by itself, never because another one is gone: recipe, environment."""
ECHO = 2.0
"""Seconds that the other ranks have to end by themselves, and to say why, when one has failed."""
PARTING = 60.0
"""The same when one has stopped early: the others may still be writing their part of a checkpoint."""
GRACE = 20
"""Seconds between SIGTERM and SIGKILL for ranks that are left."""
PERIOD = 0.05
"""Seconds between two looks at the ranks."""
OWN_PORTS = range(20_000, 32_000)
"""Where the first rank listens for the others."""
PATIENCE = "asked to stop: a run finishes its step and saves; Ctrl-C again ends all ranks at once"
"""Said at the first Ctrl-C."""
HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass(frozen=True)
class Outcome:
    """How the ranks of a run ended, all together."""

    code: int
    """0 if all did; else the code that tells most: 3 or 4, then 128 + n of a rank that signal n killed, then
    any other of a rank that failed; 75 if all that did not end with 0 stopped early.
    """
    reason: str
    """What is seen from outside: `rank 1 was killed by SIGKILL (out of memory?)`, `stopped by SIGTERM`."""
    unsaid: bool
    """Whether the ranks can't have said so themselves: one was killed, or all were asked to end."""
    asked: bool = False
    """Whether the ranks were asked to end, and ended otherwise than by themselves."""


def run_local(world_size: int, arguments: Sequence[str], command: Sequence[str] | None = None) -> Outcome:
    """Run `python -m dsplugins ARGUMENTS` (or `command`) as `world_size` ranks on this machine.

    SIGTERM, SIGINT and SIGHUP are handed on, once to each rank; a second Ctrl-C ends them. When one rank
    fails, all are ended. No restarts. For the main thread only, as signal handlers are.
    """
    program, *rest = command or (sys.executable, "-m", "dsplugins", *arguments)
    # Its warnings tell of signals that we send; its errors, such as a rank that SIGKILL can't end, stay.
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.ERROR)
    port = _free_port()
    ranks = Ranks(
        name="rank",
        entrypoint=program,
        args=dict.fromkeys(range(world_size), tuple(rest)),
        envs={rank: _environment(rank, world_size, port) for rank in range(world_size)},
        logs_specs=Terminal(),
    )
    try:
        ranks.start()
        ends = _watch(ranks)
    except SignalException as asked:  # raised before our handlers stood: there was no rank yet
        said = f"stopped by {_signal_name(asked.sigval)}"
        return Outcome(128 + asked.sigval, said, unsaid=True, asked=True)
    finally:
        ranks.close(signal.SIGKILL)
    return _outcome(ends, ranks.handed_on)


class Ranks(SubprocessContext):
    """The library's processes; signals that ask the launcher to end are kept until `hand_on`."""

    handed_on: list[int]
    """What the ranks were sent by `hand_on`."""
    insisted: bool
    """Whether Ctrl-C came a second time."""

    def start(self) -> None:
        """Start all ranks."""
        self._asked: list[int] = []
        self.handed_on, self.insisted = [], False
        self._before = {number: signal.getsignal(number) for number in (*HANDED_ON, signal.SIGQUIT)}
        super().start()

    def _start(self) -> None:
        # The library has just set its handlers, also for signals that nohup had switched off.
        self._put_back()
        for number in HANDED_ON:
            if self._before[number] != signal.SIG_IGN:
                signal.signal(number, lambda number, _: self._asked.append(number))
        super()._start()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hand_on(self) -> None:
        """Send the ranks what the launcher has been sent since the last call, unless they had that before."""
        while self._asked:
            number = self._asked.pop(0)
            if number in self.handed_on:
                self.insisted |= number == signal.SIGINT
                continue
            self.handed_on.append(number)
            if number == signal.SIGINT:
                print(f"\n{PATIENCE}", file=sys.stderr, flush=True)
            for handler in self.subprocess_handlers.values():
                handler.proc.send_signal(number)

    def codes(self) -> dict[int, int]:
        """Rank -> exit code of those that have ended, as `subprocess` gives it: negative for a signal."""
        codes = {rank: handler.proc.poll() for rank, handler in self.subprocess_handlers.items()}
        return {rank: code for rank, code in codes.items() if code is not None}

    def close(self, death_sig: signal.Signals | None = None, timeout: int = GRACE) -> None:
        """End the ranks that are left: `death_sig` (SIGTERM), and SIGKILL after `timeout` seconds."""
        super().close(death_sig, timeout)
        self._put_back()


class Terminal(LogsSpecs):
    """Ranks write where the launcher does, without a file or a thread in between."""

    root_log_dir = ""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """No file for any stream of any rank."""
        nowhere = dict.fromkeys(envs, "")
        return LogsDest(stdouts=nowhere, stderrs=nowhere, error_files=nowhere)


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    cores = str(max(1, _cores() // world_size))
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", cores),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        LAUNCHER: str(os.getpid()),
    }


def _free_port() -> int:
    """One that nobody listens on, and that the system gives nobody until the first rank listens there.

    What asks for any port, as each pair of gloo's ranks does, is given one of another range: by default 32768
    and above on Linux, 49152 elsewhere. Failing that, whichever the system gives.
    """
    for port in random.SystemRandom().sample(OWN_PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    return int(get_free_port())


def _cores() -> int:
    """Cores that this process may use, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class End:
    """How a rank ended."""

    rank: int
    code: int
    """Negative for a signal."""
    pressed: bool
    """Whether it had to be ended, because another one had ended."""


def _watch(ranks: Ranks) -> list[End]:
    """The ends of all ranks, in the order in which they were seen. The first failure ends the others."""
    ends: dict[int, End] = {}
    limit = math.inf
    while len(ends) < ranks.nprocs and time.monotonic() < limit and not ranks.insisted:
        ranks.hand_on()
        for rank, code in ranks.codes().items():
            if rank in ends:
                continue
            ends[rank] = End(rank, code, pressed=False)
            if code:
                limit = min(limit, time.monotonic() + (PARTING if code == STOPPED else ECHO))
        time.sleep(PERIOD)
    ranks.close(timeout=GRACE)
    pressed = [End(rank, code, pressed=True) for rank, code in ranks.codes().items() if rank not in ends]
    return [*ends.values(), *pressed]


def _outcome(ends: Sequence[End], handed_on: Sequence[int]) -> Outcome:
    cause = min((end for end in ends if end.code), key=_weight, default=End(0, 0, False))
    code = cause.code if cause.code >= 0 else 128 - cause.code
    if handed_on and code not in (0, STOPPED, *KNOWN_CAUSES):
        return Outcome(code, f"stopped by {_signal_name(handed_on[0])}", unsaid=True, asked=True)
    return Outcome(code, _reason(cause), unsaid=cause.code < 0)


def _reason(cause: End) -> str:
    if cause.pressed:
        return f"rank {cause.rank} was still running {PARTING:g} s after another had stopped, and was ended"
    if cause.code < 0:
        return f"rank {cause.rank} was killed by {_signal_name(-cause.code)}"
    return f"rank {cause.rank} ended with exit code {cause.code}"


def _weight(end: End) -> int:
    """Less for an end that is more of a cause: a rank whose peer is gone crashes too, and which of the two
    is seen first is a matter of luck.
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
