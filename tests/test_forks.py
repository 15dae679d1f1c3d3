"""Forks stand in for processes of an interpreter: compared with real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from forks import Fork, run

NESTED = """
import os, subprocess, sys
line = [sys.executable, "-c", "import os, sys; print(os.getppid(), os.getsid(0) == os.getpid()); sys.exit(9)"]
done = subprocess.run(line, capture_output=True, text=True, start_new_session=True)
print(done.stdout == f"{os.getpid()} True\\n", done.returncode, os.environ["GIVEN"], os.getcwd())
"""
TIDY = """
import os, subprocess, sys, tempfile
folder = tempfile.TemporaryDirectory()
subprocess.run([sys.executable, "-c", "pass"])
print(os.path.exists(folder.name))
"""


@pytest.mark.parametrize(
    "program",
    [
        "import sys; print(__name__, sys.argv); sys.exit(4)",
        "import os; print(1, flush=True); os._exit(75)",
        "import sys; sys.exit('said')",
        "1 / 0",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import atexit; atexit.register(print, 'the end')",
        "import sys; print(sys.path[1:], sys.stdin.read(), file=sys.stderr)",
        NESTED,
        TIDY,
    ],
)
def test_a_fork_ends_and_prints_as_an_interpreter(tmp_path, program):
    line = [sys.executable, "-c", program, "argument"]
    known = {"cwd": tmp_path, "env": os.environ | {"GIVEN": "this", "PYTHONPATH": str(tmp_path)}}
    real = subprocess.run(line, **known, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    fork = run(line, **known)
    assert (fork.returncode, fork.stdout) == (real.returncode, real.stdout)
    assert fork.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_a_fork_can_be_sent_signals(tmp_path):
    program = "import pathlib, time; pathlib.Path('there').touch(); time.sleep(60)"
    fork = Fork([sys.executable, "-c", program], tmp_path)
    while not (tmp_path / "there").exists():
        assert fork.poll() is None
        time.sleep(0.01)
    fork.send_signal(signal.SIGTERM)
    assert fork.wait(60) == -signal.SIGTERM


def test_site_customize_and_modules_are_found(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['CUSTOM'] = 'yes'\n")
    (tmp_path / "mine.py").write_text("import os, sys; print(__name__, os.environ['CUSTOM'], sys.argv[1:])\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ways = [["-m", "mine"], [tmp_path / "mine.py"]]
    said = [run([sys.executable, *way, "-x"], "/", environment).stdout for way in ways]
    assert said == ["__main__ yes ['-x']\n"] * 2
