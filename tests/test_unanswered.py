"""A collective that other ranks don't join is told as that, whoever ran into it."""

from __future__ import annotations

import pytest

from dsplugins.unanswered import NoAnswer, told

GLOO = "[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 9000ms for send operation to complete"
NCCL = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)"
STORE = "wait timeout after 9000ms, keys: /default_pg/0//cuda"


@pytest.mark.parametrize("words", [GLOO, NCCL, STORE])
def test_the_time_is_up(words):
    with pytest.raises(NoAnswer) as raised, told(0.15):
        raise RuntimeError(f"{words}\nException raised from wait at x.cpp:1\nframe #0")
    expected = "no answer from other ranks within run.timeout_minutes=0.15: a rank hangs or is gone"
    assert str(raised.value) == f"{expected} ({words})"


def test_also_where_something_was_made_of_it():
    with pytest.raises(NoAnswer, match=r"is gone \(step-00000002 can't be written\)"), told(1.0):
        try:
            raise RuntimeError(GLOO)
        except RuntimeError as error:
            raise OSError("step-00000002 can't be written") from error


@pytest.mark.parametrize("said", ["Connection closed by peer", "timeout", "out of memory", ""])
def test_everything_else_stays_as_it_is(said):
    error = RuntimeError(said)
    with pytest.raises(RuntimeError) as raised, told(1.0):
        raise error
    assert raised.value is error
