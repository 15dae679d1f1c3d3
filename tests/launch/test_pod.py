"""The first process of a pod: it hands signals on, and leaves with the code of `status.json`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.launching import pod
from dsplugins.launching.job import Cluster, Job
from dsplugins.launching.templates import fill

STATUS = "import json, pathlib, time, sys\ndef status(code): pathlib.Path('out/status.json').write_text(" + (
    "json.dumps({'code': code, 'time': time.time()}))\n"
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
RANK = (
    STATUS
    + """
import signal
def stop(number, frame):
    pathlib.Path('asked').write_text(signal.Signals(number).name)
    status(75)
    sys.exit(75)
for each in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(each, stop)
pathlib.Path('ready').touch()
time.sleep(60)
"""
)


def of_the_pod():
    """Environment variables that the template writes down."""
    cluster = Cluster(nodes=1, image="a", shared="/data", claim="mine")
    job = Job("a-run", cluster, 1, 0, "python", "/data", "out", ("train",))
    (replicated,) = yaml.safe_load(fill("jobset.yaml", job))["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    given = {entry["name"]: entry.get("value") for entry in container["env"]}
    return {name: given[name] for name in ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_SIGNALS_TO_HANDLE")}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PET_NODE_RANK", "0")
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest's own stay
    (tmp_path / "out").mkdir()
    return tmp_path


class Pod:
    """The pod's first process, in the environment that the template describes; ended with the test."""

    def __init__(self, folder, *command):
        line = [sys.executable, "-m", "dsplugins.launching.pod", "out", *command]
        self.process = subprocess.Popen(line, cwd=folder, env=os.environ | of_the_pod())

    def asked(self, ready, number=signal.SIGTERM):
        """Its exit code, once it was sent a signal when the file `ready` was there."""
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def leave(program):
    return pod.main("out", [sys.executable, "-c", STATUS + program])


@pytest.mark.parametrize("code", [3, 4, 75])
def test_the_code_is_that_of_the_run(folder, code):
    assert leave(f"status({code}); sys.exit(1)") == code


def test_an_end_without_a_word_is_a_crash(folder):
    assert leave("sys.exit(1)") == 1
    assert leave("status(0); sys.exit(0)") == 0


@pytest.mark.parametrize("node", ["0", "1"])
def test_what_an_earlier_attempt_left_does_not_count(folder, monkeypatch, node):
    monkeypatch.setenv("PET_NODE_RANK", node)
    (folder / "out" / "status.json").write_text(json.dumps({"code": 75, "time": 1.0}))
    assert leave("sys.exit(1)") == 1


def test_a_run_directory_that_can_not_be_written(folder):
    (folder / "file").touch()
    with pytest.raises(EnvironmentUnfit, match="run.directory file can't be written"):
        pod.main("file", ["true"])


def test_ranks_know_where_their_code_is_looked_for(folder):
    recipe = [sys.executable, "-m", "dsplugins", "train", "no_such.yaml"]
    assert pod.main("out", ["sh", "-c", f"{shlex.join(recipe)}; exit 1"]) == 3
    assert pod.main("out", ["sh", "-c", f"{shlex.join([*recipe, '--no-such'])}; exit 1"]) == 2


@pytest.mark.parametrize(("number", "by"), [(signal.SIGTERM, []), (signal.SIGUSR1, TORCHRUN)])
def test_signals_are_handed_on(folder, number, by):
    """By torchrun, too, in the environment that the template describes."""
    (folder / "rank.py").write_text(RANK)
    with Pod(folder, sys.executable, *by, "rank.py") as pod_:
        assert pod_.asked(folder / "ready", number) == 75
    assert (folder / "asked").read_text() == number.name


STARTING = "import pathlib, time; pathlib.Path('ready').touch(); time.sleep(60)"
"""A rank that is still importing: a signal ends it, and it says nothing."""


@pytest.mark.parametrize("by", [[], TORCHRUN], ids=["torchrun starts", "its ranks start"])
def test_a_stop_before_the_run_could_say_a_word(folder, by):
    (folder / "rank.py").write_text(STARTING)
    with Pod(folder, sys.executable, *by, "rank.py") as pod_:
        assert pod_.asked(folder / "ready") == 75
    status = json.loads((folder / "out" / "status.json").read_text())
    assert status["code"] == 75
    assert status["reason"] == "stopped by SIGTERM before it took a step: start it again"


def test_a_stop_before_torchrun_is_there(folder, monkeypatch):
    """The signal comes while the run directory is looked at; torchrun gets it all the same."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    term = signal.SIGTERM
    monkeypatch.setattr(pod.RunDirectory, "announce", lambda _: handlers[term](term, None))
    assert leave("time.sleep(60)") == 75


@pytest.mark.parametrize(("said", "code"), [("status(1)", 1), ("status(3)", 3), ("step()", 1)])
def test_a_stop_changes_no_verdict_and_hides_no_loss(folder, said, code):
    """After a step, the run has to save: without a word of that it has crashed."""
    step = """
def step():
    row = {'step': 1, 'time': time.time()}
    pathlib.Path('out/metrics.jsonl').write_text(json.dumps(row) + chr(10))
"""
    (folder / "rank.py").write_text(f"{STATUS}{step}{said}\n{STARTING}")
    with Pod(folder, sys.executable, "rank.py") as pod_:
        assert pod_.asked(folder / "ready") == code
