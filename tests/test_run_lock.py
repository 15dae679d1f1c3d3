"""Locks of machines that may be gone."""

from __future__ import annotations

import fcntl
import os
from threading import Timer

import pytest

from dsplugins import run_lock
from dsplugins.run_lock import Occupied, held


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The lock file as a process of another machine holds it."""
    monkeypatch.setattr(run_lock, "LEASE", 0.2)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 1 of another.machine")
        file.flush()
        yield file


def test_it_is_waited_for(tmp_path, monkeypatch, elsewhere, capsys):
    """A file server lets it go after a while."""
    monkeypatch.setattr(run_lock, "LEASE", 20.0)
    Timer(0.3, elsewhere.close).start()
    with held(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()
    assert "is held by process 1 of another.machine; if that machine is gone" in capsys.readouterr().err


def test_then_it_is_told_with_the_way_on(tmp_path, elsewhere):
    said = rf"by process 1 of another.machine: .* for good, remove {tmp_path / 'lock'}"
    with pytest.raises(Occupied, match=said), held(tmp_path):
        pass
    (tmp_path / "lock").unlink()
    with held(tmp_path):
        pass


def test_a_process_of_this_machine_is_there_or_gone(tmp_path, capsys):
    with held(tmp_path), pytest.raises(Occupied, match=f"by process {os.getpid()} of"), held(tmp_path):
        pass
    assert "waiting" not in capsys.readouterr().err
