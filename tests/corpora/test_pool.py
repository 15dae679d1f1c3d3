"""Work in several processes: what becomes of the others when one is killed."""

import multiprocessing
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from dsplugins.corpora.pool import ordered

KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
LONG = "import time; time.sleep(600)"


def test_a_process_that_is_killed_ends_the_others_at_once():
    before, began = multiprocessing.active_children(), time.monotonic()
    with pytest.raises(BrokenProcessPool):
        list(ordered(exec, [LONG, KILLED], 2, lambda: None))
    assert time.monotonic() - began < 120, "the pool waited for the other one's task"
    assert multiprocessing.active_children() == before


def test_leaving_waits_for_tasks_unless_a_process_is_lost():
    """A process that was killed may hold the lock that the others need for their results."""
    before, began = multiprocessing.active_children(), time.monotonic()

    def leave() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(ordered(exec, [LONG, KILLED], 2, leave))
    assert time.monotonic() - began < 120
    assert multiprocessing.active_children() == before
