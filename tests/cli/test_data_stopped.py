"""`dsplugins data build`, stopped or met by another: no half files, no files of two, and it says so."""

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
def line(bpe, tmp_path):
    """`line(source)`: the command, with one --out whatever is read."""
    begin, end = [sys.executable, "-m", "dsplugins", "data", "build"], ["--tokenizer", bpe.path]
    return lambda source: [*begin, source, *end, "--out", tmp_path / "made" / "c", "--workers", "2"]


@pytest.fixture
def build(line, source, tmp_path):
    """A build with two workers that has written something, in a session of its own."""
    started = forks.Fork(line(source), together=False, session=True)

    def begun():
        return any(file.stat().st_size for file in (tmp_path / "made").glob("c.bin.*.partial"))

    until(lambda: begun() or started.poll() is not None)
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


@pytest.fixture
def small(tmp_path):
    """`small(name)`: documents that all say that name."""

    def make(name, lines=2000):
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps({"text": f"{name} {i} " * 50}) + "\n" for i in range(lines))
        return path

    return make


def test_a_second_build_is_refused_while_one_is_under_way(build, line, small, tmp_path):
    out = tmp_path / "made" / "c"
    for more in ([], ["--overwrite"]):
        done = forks.run([*line(small("second")), *more])
        assert done.returncode == 4 and done.stdout == ""
        (said,) = done.stderr.splitlines()
        assert f"another build of {out} is under way, by process {build.pid} of " in said
        assert said.endswith(": wait for it, or choose another --out")
    assert build.poll() is None and not out.with_name("c.bin").exists()
    build.send_signal(signal.SIGTERM)
    build.communicate(timeout=PATIENCE)
    assert not list(out.parent.iterdir())


def test_what_a_killed_build_left_is_taken_over_and_cleared(build, line, small, tmp_path):
    build.kill()
    out = tmp_path / "made" / "c"
    assert len(list(out.parent.iterdir())) >= 2, "who it was, and half files"
    done = forks.run(line(small("second")))
    assert done.returncode == 0, done.stderr
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"{out}.building was left by process {build.pid} of ")
    assert said.endswith(", which has ended: taken over")
    assert sorted(file.name for file in out.parent.iterdir()) == ["c.bin", "c.bytes.npy", "c.idx", "c.json"]


def test_of_two_builds_at_once_one_makes_the_corpus(bpe, core, line, small, tmp_path):
    from dsplugins.corpora import sidecar
    from dsplugins.corpora.reading import changed, opened

    sources = [small("first", 20_000), small("second", 20_000)]
    started = [forks.Fork(line(source), together=False) for source in sources]
    ended = [(build.communicate(PATIENCE), build.returncode) for build in started]
    assert sorted(code for _, code in ended) in ([0, 4], [0, 2]), ended  # 2: when the first one had finished
    won = [code for _, code in ended].index(0)
    out = tmp_path / "made" / "c"
    assert sorted(file.name for file in out.parent.iterdir()) == ["c.bin", "c.bytes.npy", "c.idx", "c.json"]
    made = sidecar.read(out)
    assert made.inputs[0]["path"] == str(sources[won]) and changed(out, made) == []
    read = opened(out)
    assert len(read) == 20_000
    assert all(sources[won].stem in bpe.decode(read[index]) for index in range(0, 20_000, 97))


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
