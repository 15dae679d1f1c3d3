"""Work in several processes, results in the order of the tasks, few of either in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice

AHEAD = 4
"""Tasks a process that are begun before the first one's result is taken."""
PARALLEL = "TOKENIZERS_PARALLELISM"
"""The tokenizers library starts a thread a core unless this says false."""


def ordered[Task, Result](
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[Result]:
    """`work` of each task, in order. With one worker in this process, else in so many others.

    `work` and its tasks are pickled: small. An exception of one task is raised in its turn.
    """
    if workers == 1:
        with _one_thread():
            yield from map(work, tasks)
        return
    # Spawned, not forked: this process may have threads. They inherit the variable.
    context = multiprocessing.get_context("spawn")
    with _one_thread():
        pool = ProcessPoolExecutor(workers, context, _begin)
        try:
            yield from _drained(pool, work, iter(tasks), workers * AHEAD)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _drained[Task, Result](
    pool: ProcessPoolExecutor, work: Callable[[Task], Result], tasks: Iterator[Task], ahead: int
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque(pool.submit(work, task) for task in islice(tasks, ahead))
    while waiting:
        result = waiting.popleft().result()
        waiting.extend(pool.submit(work, task) for task in islice(tasks, 1))
        yield result


def _begin() -> None:
    """In a new process: Ctrl-C is for the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
