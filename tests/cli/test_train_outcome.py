"""What `status.json` and the exit code say when ranks could not say it themselves."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from dsplugins.cli import start
from dsplugins.cli.train import _outcome, command
from dsplugins.launcher import Outcome
from dsplugins.rundir import RunDirectory

TINY = str(Path(__file__).parents[1] / "tiny.yaml")
EARLY = "stopped by {} before it took a step: give the same command again"


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.announce()
    return directory


def asked(number):
    return Outcome(128 + number, f"stopped by {number.name}", unsaid=True, asked=True)


def stepped(run, moment):
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "time": moment}) + "\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_asked_to_end_before_a_step(run, number):
    began = time.time()
    stepped(run, began - 60)  # of an earlier attempt
    status = _outcome(run, asked(number), began)
    assert (status["code"], status["reason"]) == (75, EARLY.format(number.name))
    assert run.status()["code"] == 75


def test_asked_to_end_by_what_ranks_do_not_listen_to(run):
    """A terminal that is closed: steps since the last checkpoint are lost."""
    began = time.time()
    stepped(run, began + 1)
    status = _outcome(run, asked(signal.SIGHUP), began)
    assert (status["code"], status["reason"]) == (1, "stopped by SIGHUP")


def test_another_run_s_status_is_left_alone(run):
    """Where nothing is locked, a second one may begin."""
    RunDirectory(run.path).announce()
    status = _outcome(run, Outcome(4, "rank 0 left with code 4", unsaid=False), time.time())
    assert status["code"] == 4 and "is another run's by now" in status["reason"]
    assert run.status()["code"] is None


@pytest.mark.parametrize("rows", [0, 1])
def test_a_crash_when_asked_is_no_early_end(run, rows):
    """Whether a rank said why it failed, or a step was lost."""
    began = time.time()
    run.end(1, "rank 0: ValueError")
    for _ in range(rows):
        stepped(run, began + 1)
    assert _outcome(run, asked(signal.SIGTERM), began)["code"] == 1


@pytest.mark.parametrize(("code", "reason"), [(0, "complete"), (75, "stopped by SIGUSR1, saved in x")])
def test_asked_once_more_when_all_was_said(run, code, reason):
    run.end(code, reason)
    status = _outcome(run, asked(signal.SIGTERM), time.time())
    assert (
        (status["code"], status["reason"]) == (code, reason) == (run.status()["code"], run.status()["reason"])
    )


def test_a_killed_rank_is_no_early_end(run):
    killed = Outcome(137, "rank 1 was killed by SIGKILL (out of memory?)", unsaid=True)
    status = _outcome(run, killed, time.time())
    assert (status["code"], status["reason"]) == (1, killed.reason)


def test_ranks_that_left_without_a_word(run):
    status = _outcome(run, Outcome(0, "", unsaid=False), time.time())
    assert (status["code"], status["reason"]) == (1, "all ranks left before the run was complete")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_asked_to_end_before_there_are_ranks(monkeypatch, tmp_path, number):
    """While the launcher is imported, for example; what was there before is heard again afterwards."""
    monkeypatch.setattr(start, "started", lambda plan, arguments: signal.raise_signal(number))
    before = signal.signal(number, signal.default_int_handler)
    try:
        done = CliRunner().invoke(command, [TINY, f"run.directory={tmp_path}/run"])
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    status = RunDirectory(tmp_path / "run").status()
    assert done.exit_code == status["code"] == 75
    assert status["reason"] == EARLY.format(number.name) and status["reason"] in done.output
