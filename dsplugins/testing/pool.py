"""Resident worker processes: started at the first job, kept, and thrown away when a job fails."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

from dsplugins.testing.rank import Answer, describe, serve

GRACE = 5.0
"""Seconds that the other ranks get to answer once one has failed; they may hang in a collective."""
START = 180.0
"""Seconds that a pool may take to start: the import of megatron-core on a busy machine."""
PRELOADED = "dsplugins.testing.preloaded"


class JobFailed(RuntimeError):
    """A job raised, died or hung on some rank; the message has each rank's traceback.

    `__cause__` is the first failed rank's exception where it could be carried over.
    """


class Workers:
    """A pool of `size` gloo ranks with the CPU platform, started at the first job and then kept.

    A pool in which a job failed is thrown away: its ranks may be out of step with each other.
    """

    def __init__(self, size: int, timeout: float = 300.0) -> None:
        self.size = size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._store: Any = None

    def run(self, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run `job(*args, **kwargs)` on every rank; the results, by rank.

        `job` is a module-level function; arguments and results are pickled. Raises `JobFailed` when
        a rank raises, dies, or hasn't answered after `timeout` seconds.
        """
        message = pickle.dumps(describe(job, args, kwargs))
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(message)
        answers = self._collect(self.timeout)
        if any(answer is None or answer.traceback for answer in answers):
            self.stop()
            raise _failure(job.__qualname__, answers, self.timeout)
        return [answer.value for answer in answers if answer is not None]

    def stop(self) -> None:
        """Kill the processes; the next job starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        """Spawn the ranks. The store lives here, on a port that the system picks: nothing races."""
        import torch.distributed as dist

        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        starts = context()
        for rank in range(self.size):
            ours, theirs = starts.Pipe()
            process = starts.Process(
                target=serve, args=(rank, self.size, self._store.port, theirs, self.timeout), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        answers = self._collect(START)
        if any(answer is None or answer.traceback for answer in answers):
            self.stop()
            raise _failure("the start of the pool", answers, START)

    def _collect(self, timeout: float) -> list[Answer | None]:
        """One answer a rank; None where a rank died or let the time pass."""
        answers: list[Answer | None] = [None] * self.size
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in connection.wait(list(waiting), timeout=left):
                assert isinstance(pipe, connection.Connection)
                rank = waiting.pop(pipe)
                answers[rank] = _receive(pipe)
                if answers[rank].traceback:  # type: ignore[union-attr]
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers


def _receive(pipe: connection.Connection) -> Answer:
    try:
        return pickle.loads(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        return Answer(traceback="the process died")


def _failure(name: str, answers: Sequence[Answer | None], timeout: float) -> JobFailed:
    """The exception that tells what happened on each rank that didn't finish."""
    told = []
    for rank, answer in enumerate(answers):
        if answer is None:
            told.append(
                f"rank {rank}: no answer (limit {timeout:.0f} s, {GRACE:.0f} s after another failure)"
            )
        elif answer.traceback:
            told.append(f"rank {rank}:\n{answer.traceback}")
    failure = JobFailed(f"{name} failed\n" + "\n".join(told))
    failure.__cause__ = next((answer.error for answer in answers if answer and answer.error), None)
    return failure


def context() -> Any:
    """Workers are forks of one process that has imported megatron-core and done nothing else.

    A fork is safe there: importing starts no thread. Not so on macOS, whose own libraries start some.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload([PRELOADED])
    return forking


__all__ = ["JobFailed", "Workers", "context"]
