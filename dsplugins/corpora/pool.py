"""Work in several processes, results in the order of the tasks, few of either in memory.

Each process has a pipe of its own: no lock, queue or thread is shared by two of them, so that one which is
killed, at any instant, leaves nothing behind that another could wait for. (concurrent.futures' pool does; it
may also not see the end of its newest process before another one's result.)
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
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

Answer = tuple[Any, Exception | None]
"""What a task came to: its result, or what it raised."""


class ProcessLost(Exception):
    """A process ended in the middle of its work: somebody killed it, as the system does without memory."""


@dataclass
class _Hand:
    """A process, and this end of the pipe to it."""

    process: SpawnProcess
    pipe: connection.Connection
    task: int | None = None
    """The number of the one that it is at."""

    def give(self, number: int, task: object) -> None:
        """A task, when it has none: then it reads, and this never waits for one that waits for us."""
        self.task = number
        try:
            self.pipe.send_bytes(pickle.dumps(task))
        except ConnectionError as error:
            raise ProcessLost from error

    def take(self) -> tuple[int, Answer]:
        """The number of its task, and the answer; ProcessLost where that ends before its end."""
        assert self.task is not None
        try:
            answer = self.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise ProcessLost from error
        number, self.task = self.task, None
        return number, pickle.loads(answer)


def ordered[Task, Result](
    work: Callable[[Task], Result], tasks: Iterable[Task], workers: int, idle: Callable[[], object]
) -> Generator[Result]:
    """`work` of each task, in order. With one worker in this process, else in so many others.

    `idle` is called again and again while others work, and may raise. They are ended where they are when this
    generator is left, and with this process, however it ends.

    `work`, tasks and results are pickled. An exception of one task is raised in its turn, ProcessLost as soon
    as a process has been killed.
    """
    if workers == 1:
        with _one_thread():
            yield from map(work, tasks)
        return
    pool = _Pool(work, iter(tasks), workers)
    try:
        with _one_thread():
            yield from pool.results(idle)
    finally:
        pool.end()


class _Pool[Task, Result]:
    """Processes, started as there are tasks for them."""

    def __init__(self, work: Callable[[Task], Result], tasks: Iterator[Task], workers: int) -> None:
        self._work, self._tasks, self._workers = work, tasks, workers
        self._hands: list[_Hand] = []
        self._given = 0

    def results(self, idle: Callable[[], object]) -> Iterator[Result]:
        """One of each task, in their order."""
        answers: dict[int, Answer] = {}
        for number in count():
            while number not in answers:
                self._give(number + self._workers * AHEAD)
                busy = {hand.pipe: hand for hand in self._hands if hand.task is not None}
                if not busy:
                    return
                ready = connection.wait(busy, PERIOD)
                idle()  # before it is told that one is gone: whoever ended it may have asked us, too
                answers.update(hand.take() for pipe, hand in busy.items() if pipe in ready)
            result, error = answers.pop(number)
            if error is not None:
                raise error
            yield result

    def _give(self, until: int) -> None:
        """A task, of those up to number `until`, for each process that has none."""
        while self._given < until:
            hand = next((hand for hand in self._hands if hand.task is None), None)
            if hand is None and len(self._hands) == self._workers:
                return
            try:
                task = next(self._tasks)
            except StopIteration:
                return
            if hand is None:
                hand = _started(self._work)
                self._hands.append(hand)
            hand.give(self._given, task)
            self._given += 1

    def end(self) -> None:
        """All processes, where they are."""
        for hand in self._hands:
            hand.process.kill()
        for hand in self._hands:
            hand.process.join()
            hand.pipe.close()


def _started(work: Callable[[Any], object]) -> _Hand:
    """Spawned, not forked: this process may have threads. Signals are for this one alone: blocked there."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # the process alone has it: when it ends, there is nothing more to read here
    return _Hand(process, ours)


def _serve(pipe: connection.Connection, work: Callable[[Any], object]) -> None:
    """A process's life, which ends with the one that started it, be it killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was started by `_started`"

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
    while True:
        try:
            task = pickle.loads(pipe.recv_bytes())
            pipe.send_bytes(_answer(work, task))
        except (EOFError, ConnectionError):
            return


def _answer(work: Callable[[Any], object], task: object) -> bytes:
    """An `Answer`, pickled. What an exception can't bring along is in its words."""
    try:
        return pickle.dumps((work(task), None))
    except Exception as error:
        error.add_note(traceback.format_exc())
        try:
            told = pickle.dumps((None, error))
            pickle.loads(told)
        except Exception:
            return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
        return told


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


__all__ = ["ProcessLost", "ordered"]
