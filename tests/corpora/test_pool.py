"""Work in several processes: its order, and what becomes of it when one is killed, at whatever instant."""

import multiprocessing
import pickle
import time
from contextlib import closing

import pytest

from dsplugins.corpora.pool import AHEAD, ProcessLost, ordered

KILLED = "__import__('os').kill(__import__('os').getpid(), 9)"
LONG = "__import__('time').sleep(600)"
CUT_OFF = f"[__import__('threading').Timer(0.5, lambda: {KILLED}).start(), bytes(10**8)]"
"""Killed while it hands over its result."""
UNREADABLE = "type('X', (), {'__reduce__': lambda self: (exec, ('raise KeyError(1)',))})()"
SOON = 120.0


def nothing() -> None:
    """Nothing else to do."""


def evaluated(*tasks, idle=nothing):
    return ordered(eval, tasks, 2, idle)


@pytest.fixture(autouse=True)
def soon():
    """Nothing waits for the long task, and no process stays."""
    before, began = set(multiprocessing.active_children()), time.monotonic()
    yield
    assert time.monotonic() - began < SOON
    assert not set(multiprocessing.active_children()) - before


def test_results_come_in_the_order_of_the_tasks():
    first = "__import__('time').sleep(0.3)"
    assert list(evaluated(first, *map(str, range(40)))) == [None, *range(40)]
    assert list(ordered(eval, ["3", "4"], 1, nothing)) == [3, 4]
    assert list(evaluated()) == []


def test_tasks_are_taken_a_few_ahead():
    taken = []

    def tasks():
        for number in range(100):
            taken.append(number)
            yield str(number)

    with closing(ordered(eval, tasks(), 2, nothing)) as results:
        for number, result in enumerate(results):
            assert result == number and len(taken) <= number + 2 * AHEAD
            if number == 20:
                break


def test_an_exception_is_raised_in_its_turn():
    results = evaluated("1", "2", "1 / 0", LONG)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ZeroDivisionError) as raised:
        next(results)
    assert "in _answer" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("task", "raised", "said"),
    [
        ("lambda: 0", pickle.PicklingError, "lambda"),
        ("(_ for _ in ()).throw(type('Local', (Exception,), {})('so'))", RuntimeError, "^Local: so$"),
    ],
)
def test_what_can_not_be_handed_over_is_told(task, raised, said):
    with pytest.raises(raised, match=said):
        list(evaluated(task, LONG))


@pytest.mark.parametrize("tasks", [(LONG, KILLED), (KILLED, LONG), ("1", LONG, KILLED), (LONG, "exit()")])
def test_a_process_that_is_killed_ends_the_others_at_once(tasks):
    with pytest.raises(ProcessLost):
        list(evaluated(*tasks))


def test_one_that_is_killed_while_others_results_are_written():
    with pytest.raises(ProcessLost):
        for result in evaluated("1", "2", KILLED, *["3"] * 20):
            if result == 1:
                time.sleep(3)


def test_one_that_is_killed_in_the_middle_of_its_result():
    with pytest.raises(ProcessLost):
        for _ in evaluated("1", CUT_OFF, LONG):
            time.sleep(3)


def test_a_result_that_can_not_be_read():
    with pytest.raises(KeyError):
        list(evaluated(UNREADABLE, LONG))


@pytest.mark.parametrize("other", [LONG, KILLED, CUT_OFF])
def test_leaving_waits_for_nobody(other):
    def leave() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(evaluated(LONG, other, idle=leave))
    with closing(evaluated("1", LONG)) as results:
        assert next(results) == 1


def test_a_process_that_can_not_be_started_is_told(monkeypatch):
    from multiprocessing.context import SpawnProcess

    start, started = SpawnProcess.start, []

    def once(self):
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(self)
        start(self)

    monkeypatch.setattr(SpawnProcess, "start", once)
    with pytest.raises(BlockingIOError):
        list(evaluated(LONG, "1"))
