"""What a run has been asked for from outside: to save and stop (SIGTERM, SIGINT, SIGUSR1).

Other commands have nothing to finish: they clean up and end.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Slurm, Kubernetes and our launcher send the first, `sbatch --signal=USR1` the second, Ctrl-C the third."""


class Stopped(Exception):
    """The run saved a checkpoint and stopped early, as it was asked to; exit code 75."""


class Wishes:
    """Signals since `heard` began; the step in progress is finished first."""

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        """The signal that asked to stop."""

    @contextmanager
    def heard(self) -> Iterator[Wishes]:
        """Meanwhile those signals are kept instead of ending the process; Ctrl-C a second time ends it."""
        before = {number: signal.signal(number, self._keep) for number in STOPS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _keep(self, number: int, frame: object) -> None:
        if self.stop is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = signal.Signals(number)


class Interrupted(Exception):
    """A command that keeps nothing half done was asked to stop; exit code 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        self.number, self.name = number, signal.Signals(number).name
        super().__init__(self.name)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Meanwhile those signals, and SIGHUP, are kept; what is given raises Interrupted for the first of them.

    It is to be called wherever the work can end: an exception out of nowhere would leave locks behind that
    others wait for. A signal that is ignored, as nohup has it, stays so.
    """
    asked: list[int] = []

    def check() -> None:
        if asked:
            raise Interrupted(asked[0])

    with _handled(asked.append):
        yield check


@contextmanager
def interrupted() -> Iterator[None]:
    """Meanwhile those signals, and SIGHUP, raise Interrupted wherever the process is: for work that holds
    nothing that others wait for, such as imports. A signal that is ignored stays so.
    """

    def stop(number: int) -> None:
        raise Interrupted(number)

    with _handled(stop):
        yield


@contextmanager
def _handled(told: Callable[[int], None]) -> Iterator[None]:
    heard = [each for each in (*STOPS, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, frame: told(number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["STOPS", "Interrupted", "Stopped", "Wishes", "interrupted", "interruptible"]
