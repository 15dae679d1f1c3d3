"""Runs side by side: how many at a time, what a failed one says, and that none is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from dsplugins.experiments.runs import Run, RunFailed, execute


class Script(Run):
    """A run whose command is a line of Python, given in place of the recipe."""

    def command(self, folder):
        return [sys.executable, "-c", self.recipe]


def test_the_command_is_what_a_user_would_type(tmp_path):
    folder = tmp_path / "a: b"
    line = Run("aux_free_1", "experiments/balance.yaml", ("train.steps=9",)).command(folder)
    assert line[1:6] == ["-m", "dsplugins", "train", "experiments/balance.yaml", "train.steps=9"]

    from dsplugins.recipe import Recipe

    recipe = Recipe.load(line[4], line[5:])
    assert recipe.sections["run"]["directory"] == str(folder / "aux_free_1")


@pytest.mark.parametrize("jobs", [1, 2])
def test_so_many_at_a_time(tmp_path, jobs):
    count = (
        "import os, pathlib, time\n"
        f"mark = pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.mark'); mark.touch()\n"
        "time.sleep(0.4); print(len(list(mark.parent.glob('*.mark'))), os.environ['OMP_NUM_THREADS'])\n"
        "time.sleep(0.4); mark.unlink()\n"
    )
    heard = []
    scripts = [Script(name, count, ()) for name in "abcd"]
    execute(scripts, tmp_path / "runs", jobs, heard.append)
    assert sorted(run.name for run in heard) == list("abcd")
    seen = [(tmp_path / "runs" / f"{name}.log").read_text().split() for name in "abcd"]
    assert max(int(marks) for marks, _ in seen) == jobs and {threads for _, threads in seen} == {"1"}


def test_one_failure_ends_the_others(tmp_path):
    heard, began = [], time.monotonic()
    sleeper = Script("sleeper", "import time; time.sleep(60)", ())
    failing = Script("failing", "import sys; print('no such thing'); sys.exit(3)", ())
    with pytest.raises(RunFailed, match="failing ended with code 3(.|\n)*no such thing") as caught:
        execute([sleeper, failing, Script("late", "", ())], tmp_path, 2, heard.append)
    assert caught.value.code == 3 and heard == [] and time.monotonic() - began < 30
    assert not (tmp_path / "late.log").exists()


def test_a_killed_run_has_a_shells_code(tmp_path):
    killed = Script("gone", "import os; os.kill(os.getpid(), 9)", ())
    with pytest.raises(RunFailed) as caught:
        execute([killed], tmp_path, 1, print)
    assert caught.value.code == 137


def test_sigterm_takes_the_runs_along(tmp_path):
    program = (
        "import pathlib, sys\n"
        "from dsplugins.experiments.runs import Run, execute\n"
        "class Script(Run):\n"
        "    def command(self, folder): return [sys.executable, '-c', self.recipe]\n"
        "run = Script('long', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)', ())\n"
        f"execute([run], pathlib.Path({str(tmp_path)!r}), 1, print)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    child = _pid(tmp_path / "long.log")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def _pid(log):
    """What the run printed first, once it has."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if log.exists() and log.read_text().endswith("\n"):
            return int(log.read_text())
        time.sleep(0.05)
    raise AssertionError("it started nothing")
