"""The launch scripts, with interpreters that only pretend: nothing is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
TOOLS = ("bash", "sed", "cksum", "cat", "dirname", "ls", "rm", "mkdir", "cp", "env", "chmod")
PYTHON = """#!/bin/bash
# An interpreter that pretends: {about}
case "$1 $2" in
    "--version "*) echo "Python {version}" ;;
    "-c "*version_info*) exit {old} ;;
    "-c "*) exit {lacks_venv} ;;
    "-m venv")
        [ {venv_fails} = 0 ] || exit 1
        mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
        printf '#!/bin/bash\\necho "dsplugins $*"\\n' > "$3/bin/dsplugins"
        chmod +x "$3/bin/dsplugins" ;;
    "-m pip")
        [ "$3" = install ] || exit 0
        echo "$*" >> "{log}"
        exit {pip_fails} ;;
esac
"""


class Machine:
    """A checkout with the scripts only, on a machine with the tools and interpreters given to it."""

    def __init__(self, folder):
        self.root, self.bin, self.log = folder / "a checkout", folder / "bin", folder / "pip.log"
        self.root.mkdir()
        self.bin.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.environment = {"PATH": str(self.bin), "HOME": str(folder / "home")}

    def python(self, name, version="3.12.9", **faults):
        """Put an interpreter at `name` (on PATH, unless it is a whole path)."""
        flags = {key: int(faults.get(key, False)) for key in ("old", "lacks_venv", "venv_fails", "pip_fails")}
        file = self.bin / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PYTHON.format(about=name, version=version, log=self.log, **flags))
        file.chmod(0o755)

    def run(self, *arguments, code=0, **environment):
        """Run a script with this machine's PATH; its (stdout, stderr)."""
        line = [str(self.bin / "bash"), *arguments]
        done = subprocess.run(
            line,
            env=self.environment | environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    def ensure(self, extras="plot", **rest):
        return self.run(
            "-c", f". launch/environment.sh; ensure_environment {extras}; echo VENV=$VENV", **rest
        )

    @property
    def installs(self):
        """What pip was called with, one entry a call."""
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_scripts_parse_and_can_be_run(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text()


def test_without_python_it_says_what_to_install(machine):
    machine.python("python3", "3.10.4", old=True)
    _, said = machine.ensure(code=4)
    assert "No Python >= 3.12" in said and "apt install python3.12 python3.12-venv" in said
    assert not (machine.root / ".venv").exists() and not machine.installs


@pytest.mark.parametrize("fault", ["old", "lacks_venv", "venv_fails"])
def test_an_interpreter_that_does_not_do_is_passed_over(machine, fault):
    machine.python("python3.13", "3.13.1", **{fault: True})
    machine.python("python3.12", "3.12.2")
    said, _ = machine.ensure()
    assert "Python 3.12.2" in said and f"{machine.bin}/python3.12" in said
    assert (machine.root / ".venv" / "bin" / "python").exists()


def test_the_first_that_does_is_taken(machine):
    machine.python("python3.13", "3.13.1")
    machine.python("python3.12", "3.12.2")
    assert "Python 3.13.1" in machine.ensure()[0]


@pytest.mark.parametrize("where", ["home/.pyenv", "elsewhere"])
def test_pyenv_versions_are_found(machine, tmp_path, where):
    machine.python("python3", old=True)
    machine.python(str(tmp_path / where / "versions" / "3.12.7" / "bin" / "python"), "3.12.7")
    environment = {"PYENV_ROOT": str(tmp_path / where)} if where == "elsewhere" else {}
    assert "Python 3.12.7" in machine.ensure(**environment)[0]


def test_uv_is_asked(machine, tmp_path):
    machine.python(str(tmp_path / "uv" / "python"), "3.14.0")
    uv = machine.bin / "uv"
    uv.write_text(f'#!/bin/bash\n[ "$*" = "python find >=3.12" ] && echo {tmp_path}/uv/python\n')
    uv.chmod(0o755)
    assert "Python 3.14.0" in machine.ensure()[0]


def test_installed_once_until_pyproject_or_extras_change(machine):
    machine.python("python3.12")
    said, _ = machine.ensure("plot")
    assert "installing dsplugins[plot]" in said and "installed after" in said
    assert said.endswith(f"VENV={machine.root}/.venv\n")
    assert machine.installs == [f"-m pip install --disable-pip-version-check -e {machine.root}[plot]"]
    assert machine.ensure("plot")[0] == f"VENV={machine.root}/.venv\n"
    machine.ensure("test")
    assert len(machine.installs) == 2
    with (machine.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    machine.ensure("plot")
    assert len(machine.installs) == 3


def test_a_failed_installation_is_tried_again(machine):
    machine.python("python3.12", pip_fails=True)
    _, said = machine.ensure(code=4)
    assert "pip failed after" in said
    machine.ensure(code=4)
    assert len(machine.installs) == 2


def test_an_environment_that_does_not_fit_is_left_alone(machine):
    machine.python(str(machine.root / ".venv" / "bin" / "python"), "3.9.1", old=True)
    machine.python("python3.12")
    _, said = machine.ensure(code=4)
    assert "holds Python 3.9.1" in said and "DSPLUGINS_VENV" in said
    (machine.root / "mine").mkdir()
    (machine.root / "mine" / "notes").write_text("keep")
    _, said = machine.ensure(code=4, DSPLUGINS_VENV="mine")
    assert "no working Python environment" in said
    assert (machine.root / "mine" / "notes").read_text() == "keep"


def test_another_folder_may_hold_the_environment(machine):
    machine.python("python3.12")
    said, _ = machine.ensure(DSPLUGINS_VENV="another")
    assert said.endswith(f"VENV={machine.root}/another\n")
    assert not (machine.root / ".venv").exists()


def test_quickstart_hands_its_arguments_on(machine):
    machine.python("python3.12")
    said, _ = machine.run("launch/quickstart.sh", "train.steps=2", "run.directory=a b")
    last = said.splitlines()[-1]
    assert last == "dsplugins train recipes/deepseek_v3/tiny_cpu.yaml train.steps=2 run.directory=a b"


def test_tests_stop_at_the_first_check_that_fails(machine):
    machine.python("python3.12")
    machine.ensure("test")
    tools = machine.root / ".venv" / "bin"
    for tool in ("ruff", "mypy"):
        (tools / tool).write_text(f"#!/bin/bash\nexit {int(tool == 'mypy')}\n")
        (tools / tool).chmod(0o755)
    said, _ = machine.run("launch/test.sh", code=1)
    assert "== ruff format --check ." in said and "== mypy" in said and "lint-imports" not in said


def test_gpu_goes_on_after_tests_that_fail_and_tells(machine):
    machine.python("python3.12")
    machine.python("nvidia-smi")
    machine.ensure("gpu")
    said, _ = machine.run("launch/gpu.sh", "--rounds", "2")
    assert said.splitlines()[-1] == "dsplugins experiment gpu --rounds 2"
    python = machine.root / ".venv" / "bin" / "python"
    python.write_text('#!/bin/bash\n[ "$2" != pytest ]\n')
    said, _ = machine.run("launch/gpu.sh", code=1)
    assert said.splitlines()[-1] == "dsplugins experiment gpu"
    python.write_text("#!/bin/bash\n[[ $2 != *cuda* ]]\n")
    said, told = machine.run("launch/gpu.sh", code=4)
    assert not said and "can't use it" in told


def test_a_real_interpreter_makes_a_real_environment(machine):
    (machine.bin / "python3.12").symlink_to(os.path.realpath(sys.executable))
    machine.run("-c", ". launch/environment.sh; VENV=$PWD/.venv; check_venv")
    line = [machine.root / ".venv" / "bin" / "python", "-m", "pip", "--version"]
    assert str(machine.root) in subprocess.run(line, capture_output=True, text=True, check=True).stdout
