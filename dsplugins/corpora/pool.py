"""Work in several processes, results in the order of the tasks, few of either in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from threading import Thread
from typing import Any

ASKING = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
"""Signals by which a terminal, or a batch system, asks everybody to stop."""
PERIOD = 0.2
"""Seconds between two calls of `idle`."""
AHEAD = 4
"""Tasks a process that are begun before the first one's result is taken."""
PARALLEL = "TOKENIZERS_PARALLELISM"
"""The tokenizers library starts a thread a core unless this says false."""


def ordered[Task, Result](
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int, idle: Callable[[], object]
) -> Generator[Result]:
    """`work` of each task, in order. With one worker in this process, else in so many others.

    `idle` is called again and again while others work, and may raise. They finish the task they are at when
    this generator is left, and end with this process, however it ends.

    `work` and its tasks are pickled: small. An exception of one task is raised in its turn; BrokenProcessPool
    when a process was killed, and the others are then ended where they are.
    """
    if workers == 1:
        with _one_thread():
            yield from map(work, tasks)
        return
    spawned = _Spawned()
    with _one_thread():
        pool = ProcessPoolExecutor(workers, spawned, _begin)
        try:
            yield from _drained(pool, spawned, work, iter(tasks), workers * AHEAD, idle)
        except BrokenProcessPool:
            spawned.kill()
            raise
        finally:
            # Beside this thread: where a process is lost, the pool waits for the others under its lock.
            ending = Thread(target=pool.shutdown, kwargs={"cancel_futures": True})
            ending.start()
            spawned.join()
            ending.join()


class _Spawned(SpawnContext):
    """Starts a pool's processes, and knows them.

    The pool itself looks at those that were there when it last had something to do, so that the end of its
    newest one can stay unseen. And it ends the others by SIGTERM, which is blocked in ours, and waits for
    them. Spawned, not forked: this process may have threads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[SpawnProcess] = []

    def Process(self, *arguments: Any, **named: Any) -> SpawnProcess:  # type: ignore[override]
        """A process, as the pool asks for one."""
        self.processes.append(SpawnProcess(*arguments, **named))
        return self.processes[-1]

    def lost(self) -> bool:
        """Whether one was ended: of itself it only ends, with 0, when the pool is shut down."""
        return any(process.exitcode for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def join(self) -> None:
        """Waits until each has ended its task. Unless one is lost: they may wait for a lock of it."""
        while running := [process for process in self.processes if process.exitcode is None]:
            if self.lost():
                self.kill()
            connection.wait([process.sentinel for process in running], PERIOD)


def _drained[Task, Result](
    pool: ProcessPoolExecutor,
    spawned: _Spawned,
    work: Callable[[Task], Result],
    tasks: Iterator[Task],
    ahead: int,
    idle: Callable[[], object],
) -> Iterator[Result]:
    waiting = _submitted(pool, work, islice(tasks, ahead))
    while waiting:
        first = waiting.popleft()
        while wait([first], PERIOD).not_done and not spawned.lost():
            idle()
        idle()  # before it is told that processes are gone: whoever ended them may have asked this one, too
        if not first.done():
            raise BrokenProcessPool("a process of the pool was ended")
        result = first.result()
        waiting.extend(_submitted(pool, work, islice(tasks, 1)))
        yield result


def _submitted[Task, Result](
    pool: ProcessPoolExecutor, work: Callable[[Task], Result], tasks: Iterable[Task]
) -> deque[Future[Result]]:
    """Processes are started here. Signals are for this one alone: they inherit that those are blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        return deque(pool.submit(work, task) for task in tasks)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """In a new process: it ends when the one that started it has, be it killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was started by the pool"

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLEL]
        else:
            os.environ[PARALLEL] = before


__all__ = ["ordered"]
