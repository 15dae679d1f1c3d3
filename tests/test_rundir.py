"""`status.json`: the first failure of an attempt stands, and nothing of an earlier attempt does."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
from click.testing import CliRunner

from dsplugins import run_lock, rundir
from dsplugins.cli import exits
from dsplugins.cli.train import _fail
from dsplugins.contracts import EnvironmentUnfit
from dsplugins.failures import HookFailure
from dsplugins.rundir import Occupied, RunDirectory


@pytest.fixture
def as_rank(tmp_path, monkeypatch):
    """A function: the run directory as a rank of one attempt has it, from this process on."""
    attempt = [RunDirectory(tmp_path) for _ in range(3)]

    def of(rank):
        monkeypatch.setenv("RANK", str(rank))
        return attempt[rank]

    return of


@pytest.fixture
def left(as_rank, monkeypatch):
    """A function: with which code and words a rank leaves that failed so."""

    def leave(code, message):
        raise SystemExit((code, message))

    monkeypatch.setattr(exits, "leave", leave)

    def of(rank, error):
        with pytest.raises(SystemExit) as end:
            _fail(as_rank(rank), SimpleNamespace(), error)
        return end.value.code

    return of


def test_the_first_failure_stands(as_rank):
    assert as_rank(1).end(1, "the cause")["rank"] == 1
    assert as_rank(0).end(1, "what came of it")["reason"] == "the cause"
    assert as_rank(0).status()["reason"] == "the cause"
    assert as_rank(0).end(1, "killed", overrule=True)["reason"] == as_rank(0).status()["reason"] == "killed"


def test_a_rank_may_correct_itself_and_a_failure_replaces_an_early_stop(as_rank):
    as_rank(0).end(75, "stopped")
    as_rank(1).end(1, "first thought")
    assert as_rank(1).end(3, "second thought")["code"] == as_rank(0).status()["code"] == 3


def test_an_earlier_attempt_does_not_count(as_rank, tmp_path):
    as_rank(1).end(1, "long ago")
    as_rank(0)
    assert RunDirectory(tmp_path).end(4, "now")["reason"] == "now"


def test_what_our_launcher_announced_is_of_this_attempt_however_late_a_rank_begins(
    as_rank, tmp_path, monkeypatch
):
    as_rank(1).end(1, "at once")
    as_rank(0)
    monkeypatch.setenv("DSPLUGINS_LAUNCHER", "1")
    assert RunDirectory(tmp_path).end(1, "much later")["reason"] == "at once"


def test_a_run_that_is_announced_has_no_code_yet(as_rank, tmp_path):
    as_rank(0).end(0, "complete")
    RunDirectory(tmp_path).announce()
    assert RunDirectory(tmp_path).status()["code"] is None


def test_what_is_no_folder_can_not_be_announced(tmp_path):
    (tmp_path / "file").write_text("")
    run = RunDirectory(tmp_path / "file")
    with pytest.raises(EnvironmentUnfit, match="can't be written"):
        run.announce()
    assert run.end(1, "told all the same")["reason"] == "told all the same" and run.status() is None


def test_many_processes_that_fail_at_once_leave_one_whole_status(tmp_path):
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from dsplugins.rundir import RunDirectory\n"
        "run = RunDirectory(Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
        "print(run.end(1, 'rank ' + os.environ['RANK'])['reason'])\n"
    )
    line = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    everyone = [subprocess.Popen(line, env={"RANK": str(rank)}, **pipes) for rank in range(6)]
    assert all(process.stdout.readline() == "ready\n" for process in everyone)
    for process in everyone:
        process.stdin.close()
    said = {process.stdout.read() for process in everyone}
    assert all(process.wait(60) == 0 for process in everyone)
    assert said == {json.loads((tmp_path / "status.json").read_text())["reason"] + "\n"}


def test_a_fault_of_all_ranks_is_told_once_and_of_one_rank_too(left):
    assert left(1, EnvironmentUnfit("no data")) == (4, "this machine can't run it: no data")
    assert left(0, EnvironmentUnfit("no data")) == (4, "")
    assert left(2, EnvironmentUnfit("no GPU")) == (4, "this machine can't run it: no GPU")


def test_what_follows_from_another_ranks_failure_is_one_line(left):
    code, said = left(1, HookFailure("mine", "ds_step_end", ValueError("x")))
    assert code == 1 and said.startswith("rank 1: plugin mine failed in ds_step_end: ValueError: x")
    assert left(0, RuntimeError("peer\nis gone")) == (
        1,
        "rank 0: RuntimeError: peer is gone (rank 1 had failed before)",
    )
    assert left(2, HookFailure("mine", "ds_step_end", ValueError("x")))[1].startswith("rank 2: plugin mine")


def test_a_plugins_number_never_takes_the_place_of_another():
    from dsplugins.failures import HookFailure
    from dsplugins.train import add

    row = {"loss": 1.0}
    add(row, "one", {"mine": float("nan")})
    assert row == {"loss": 1.0, "mine": None}
    for key in ("loss", "mine"):
        with pytest.raises(HookFailure, match=f"plugin two failed in ds_step_end.*{key}"):
            add(row, "two", {key: 2.0})


class Described:
    """A recipe and its plugins, as far as a run directory writes them down."""

    def __init__(self, text="a: 1\n"):
        self.as_given = self.resolved = lambda: text

    def lock(self):
        return []


def test_a_resumed_run_replaces_the_status_of_the_attempt_before(tmp_path, monkeypatch):
    """Under torchrun nobody announces it: who reads 75 while it runs would start it again for ever."""
    monkeypatch.delenv("DSPLUGINS_LAUNCHER", raising=False)
    earlier = RunDirectory(tmp_path)
    earlier.start(Described(), Described())
    earlier.end(75, "stopped by SIGTERM")
    now = RunDirectory(tmp_path)
    now.go_on(Described(), Described(), 0, [])
    assert now.status()["code"] is None


def test_a_kill_while_a_run_is_described_leaves_what_was_there(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.start(Described(), Described())

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsplugins.rundir.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run._describe(Described("b: 2\n"), Described())
    assert (tmp_path / "recipe.yaml").read_text() == "a: 1\n"
    assert json.loads((tmp_path / "plugins.lock.json").read_text())["plugins"] == []


@pytest.mark.parametrize("write", ["log", "log_evaluation", "note", "go_on"])
def test_a_full_disk_is_one_line_with_the_way_on(tmp_path, monkeypatch, write):
    run = RunDirectory(tmp_path)
    run.start(Described(), Described())
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000006.partial").mkdir()

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "_put", full)
    monkeypatch.setattr(run, "_append", full)
    arguments = {"note": ("run.json", {}), "go_on": (Described(), Described(), 0, [])}.get(write, ({},))
    with pytest.raises(EnvironmentUnfit, match=r"No space left .*; make room, .*step-00000004$") as told:
        getattr(run, write)(*arguments)
    assert exits.code_of(told.value) == 4


@pytest.mark.parametrize("fresh", [False, True])
def test_a_dump_is_kept_unless_the_run_is_to_be_fresh(tmp_path, fresh):
    (tmp_path / "not_finite").mkdir()
    RunDirectory(tmp_path).start(Described(), Described(), fresh)
    assert (tmp_path / "not_finite").exists() is not fresh


def test_a_directory_has_one_run_at_a_time(tmp_path):
    """Whoever comes second hears who is there, and leaves everything as it was."""
    with RunDirectory(tmp_path).held():
        said = rf"by process {os.getpid()} of .*: stop that one, or name"
        with pytest.raises(Occupied, match=said), RunDirectory(tmp_path).held():
            pass
    with RunDirectory(tmp_path).held():
        pass


def test_a_killed_run_blocks_nobody(tmp_path):
    code = "from dsplugins.rundir import RunDirectory as R; from pathlib import Path; import os\n"
    code += f"with R(Path({str(tmp_path)!r})).held(): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with RunDirectory(tmp_path).held():
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_without_locks_the_first_one_stops_at_its_next_step(tmp_path, monkeypatch):
    def none(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", none)
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    with first.held(), second.held():
        first.start(Described(), Described())
        first.log({"step": 1})
        second.go_on(Described(), Described(), 0, [])
        second.log({"step": 1})
        second.log({"step": 2})
        with pytest.raises(Occupied, match="another run writes there"):
            first.log({"step": 2})
        second.log({"step": 3})
    assert second.steps() == 3


def test_a_checkpoint_tells_of_a_run_whose_log_is_gone(tmp_path):
    run = RunDirectory(tmp_path)
    assert not run.begun()
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert run.begun() and run.steps() == 0


def test_steps_that_the_log_has_lost_are_told(tmp_path):
    """With the machine that wrote them: nothing is on disk before it is said to be."""
    run = RunDirectory(tmp_path)
    run.start(Described(), Described())
    for step in (1, 2, 6):
        run.log({"step": step})
    assert run.steps() == 6
    (told,) = RunDirectory(tmp_path).go_on(Described(), Described(), 5, [])
    assert "no row for 3 of 5 steps, the first 3, the last 5" in told
    assert RunDirectory(tmp_path).go_on(Described(), Described(), 2, []) == []


def test_attempts_are_kept(tmp_path):
    first = RunDirectory(tmp_path)
    first.start(Described(), Described())
    first.end(75, "stopped")
    second = RunDirectory(tmp_path)
    second.go_on(Described(), Described(), 0, [])
    second.end(0, "complete", steps=0)
    rows = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [row.get("code", "start") for row in rows] == ["start", 75, "start", 0]
    assert all(row["host"] and row["time"] for row in rows)


def test_the_first_failure_stands_whatever_the_clocks_say(tmp_path, monkeypatch):
    """Of three machines, one an hour behind and one an hour ahead."""
    RunDirectory(tmp_path).end(1, "an earlier attempt's")
    ranks = []
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        ranks.append(RunDirectory(tmp_path))
    for number, (hours, code) in enumerate([(-1, 4), (1, 1), (0, 1)]):
        monkeypatch.setenv("RANK", str(number))
        moment = time.time() + 3600 * hours
        with monkeypatch.context() as patched:
            patched.setattr(rundir.time, "time", lambda moment=moment: moment)
            ranks[number].end(code, f"rank {number}'s")
    assert RunDirectory(tmp_path).status()["reason"] == "rank 0's"


@pytest.fixture
def under_way(tmp_path):
    """A run in `out`, and what its folder holds; to be the same at the end."""
    run = RunDirectory(tmp_path / "out")
    with run.held():
        run.announce()
        before = {each.name: each.read_bytes() for each in run.path.iterdir()}
        yield [str(Path(__file__).parent / "tiny.yaml"), "run.world_size=2", f"run.directory={run.path}"]
        assert {each.name: each.read_bytes() for each in run.path.iterdir()} == before


def test_a_second_start_is_refused(under_way):
    from dsplugins.cli.train import command

    done = CliRunner().invoke(command, under_way)
    assert isinstance(done.exception, Occupied) and exits.code_of(done.exception) == 4


def test_a_second_start_by_torchrun_is_refused_by_all_ranks(under_way, tmp_path):
    """In one line."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = forks.run([sys.executable, "-m", *torchrun, "dsplugins", "train", *under_way], cwd=tmp_path)
    assert done.returncode == 1  # torchrun's own
    told = [line for line in done.stderr.splitlines() if "a run is under way in" in line]
    assert len(told) == 1 and "this machine can't run it" in told[0]


def test_an_evaluation_is_logged_once(tmp_path, monkeypatch):
    """A run that died after its last one, before `run.json`, looks again when it goes on."""
    from dsplugins import evaluate
    from dsplugins.train import Loop

    looked = SimpleNamespace(step=4, loss=2.5)
    monkeypatch.setattr(evaluate, "evaluate", lambda run, done: looked)
    loop = Loop.__new__(Loop)
    loop.assembly, loop.leads, loop.baselines = None, True, {}
    loop.directory = RunDirectory(tmp_path)
    loop.plan = SimpleNamespace(evaluate=SimpleNamespace(sequences=8))
    loop.plugins = SimpleNamespace(event=lambda *name, **given: [])
    loop.display = SimpleNamespace(evaluation=lambda *shown: None)
    loop._evaluate(4)
    loop._evaluate(4)
    assert (tmp_path / "evaluations.jsonl").read_text() == '{"step": 4, "loss": 2.5}\n'
