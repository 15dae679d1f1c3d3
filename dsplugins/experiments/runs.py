"""Runs of an experiment: `dsplugins train` in processes of its own, some side by side, and what they left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL = 0.2
"""Seconds between two looks at the running processes."""
TOLD = 25
"""Last lines of a failed run's output that are shown."""


class RunFailed(RuntimeError):
    """A run of the experiment did not end well."""

    def __init__(self, name: str, code: int, output: str) -> None:
        super().__init__(f"run {name} ended with code {code}; the end of what it printed:\n{output}")
        self.code = code
        """Exit code of `dsplugins train`; 128 + n where signal n killed it."""


@dataclass(frozen=True)
class Run:
    """One training run: nothing but a recipe and overrides, as a user would type them."""

    name: str
    """Its folder, below that of the experiment."""
    recipe: str
    overrides: tuple[str, ...]

    def command(self, folder: Path) -> list[str]:
        """The command line that trains into `folder/NAME`."""
        # JSON's quotes are YAML's: a folder may be called what it likes.
        directory = f"run.directory={json.dumps(str(folder / self.name))}"
        return [sys.executable, "-m", "dsplugins", "train", self.recipe, *self.overrides, directory]


def execute(runs: Sequence[Run], folder: Path, jobs: int, finished: Callable[[Run], None]) -> None:
    """Train each run into `folder/NAME`, `jobs` at a time with one thread each; `finished` hears of each.

    What a run prints goes to `folder/NAME.log`. One that is complete already is not trained again. Raises
    RunFailed as soon as one fails; those that still run are ended then, as they are by SIGTERM.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running = list(runs), dict[Run, subprocess.Popen[bytes]]()
    with _sigterm_raises():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = _start(run, folder)
                time.sleep(POLL)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    _check(run, running.pop(run).returncode, folder)
                    finished(run)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def _start(run: Run, folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with _log(run, folder).open("wb") as log:
        return subprocess.Popen(run.command(folder), stdout=log, stderr=log, env=environment)


def _log(run: Run, folder: Path) -> Path:
    return folder / f"{run.name}.log"


def _check(run: Run, code: int, folder: Path) -> None:
    if code:
        lines = _log(run, folder).read_text(errors="replace").splitlines()
        raise RunFailed(run.name, code if code > 0 else 128 - code, "\n".join(lines[-TOLD:]))


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Meanwhile, SIGTERM ends this process by an exception: its runs must not outlive it."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def evaluated(directory: Path, overrides: Sequence[str]) -> float:
    """Nats a token of a run's newest checkpoint, by `dsplugins evaluate` with overrides. Raises RunFailed."""
    line = [sys.executable, "-m", "dsplugins", "evaluate", str(directory), "--json", *overrides]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        told = "\n".join(done.stderr.splitlines()[-TOLD:])
        raise RunFailed(f"{directory.name}, evaluated,", done.returncode, told)
    return float(json.loads(done.stdout)["loss"])


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Rows of a complete run's `metrics.jsonl`, one a step."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def validation_loss(directory: Path) -> float:
    """Nats a token at the end of a complete run, from its `run.json`."""
    return float(json.loads((directory / "run.json").read_text())["evaluation"]["loss"])
