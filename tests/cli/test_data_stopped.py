"""`dsplugins data build`, stopped: its processes are gone, its half files too, and it says so."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import forks
import pytest

LINE = json.dumps({"text": "def f(self):\n    return self.x\n" * 40}) + "\n"
PATIENCE = 60.0


@pytest.fixture
def source(tmp_path):
    """Enough for some minutes."""
    path = tmp_path / "in.jsonl"
    path.write_text(LINE * 60_000)
    return path


@pytest.fixture
def build(bpe, source, tmp_path):
    """A build with two workers that has written something, in a session of its own."""
    line = [sys.executable, "-m", "dsplugins", "data", "build", source, "--tokenizer", bpe.path]
    line += ["--out", tmp_path / "made" / "c", "--workers", "2"]
    started = forks.Fork(line, together=False, session=True)
    partial = tmp_path / "made" / "c.bin.partial"
    until(lambda: partial.exists() and partial.stat().st_size or started.poll() is not None)
    assert started.poll() is None, started.communicate()[1]
    yield started
    started.kill()


def until(true):
    limit = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


def session(leader):
    """Processes of a session that still run, but for its leader."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = status.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(number) == leader and state != "Z" and int(status.parent.name) != leader:
            found.append(int(status.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "everybody"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGKILL, False)],
)
def test_nothing_is_left(build, tmp_path, number, everybody):
    assert len(session(build.pid)) >= 2
    if everybody:  # as the terminal does it at Ctrl-C, and Slurm
        for process in (build.pid, *session(build.pid)):
            os.kill(process, number)
    else:
        build.send_signal(number)
    _, said = build.communicate(timeout=PATIENCE)
    until(lambda: not session(build.pid))
    if number != signal.SIGKILL:
        assert build.returncode == 128 + number
        out = tmp_path / "made" / "c"
        assert said == f"stopped by {number.name}: nothing was written to {out}\n"
        assert not list(out.parent.iterdir())


def test_a_signal_that_is_ignored_stays_so():
    from dsplugins.wishes import Interrupted, interruptible

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as check:
            signal.raise_signal(signal.SIGHUP)
            check()
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(Interrupted, match="SIGTERM"):
                check()
    finally:
        signal.signal(signal.SIGHUP, before)
