"""The first process of a pod: `python -m dsplugins.launching.pod RUN_DIRECTORY COMMAND ...`.

Runs torchrun (COMMAND), hands it the signals that Kubernetes sends, and leaves with the run's code from
`status.json`, where torchrun makes 1 of every code: Kubernetes starts again after a 75, not after a 3.
A run that was asked to stop and left no code ends with 75, too, as long as it took no step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsplugins.rank import RUN
from dsplugins.rundir import STOPPED, RunDirectory

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(run_directory: str, command: Sequence[str]) -> int:
    """Run `command`; the exit code of the run.

    Raises EnvironmentUnfit if the run directory can't be written.
    """
    asked: list[int] = []
    for each in HANDED_ON:  # from now on: torchrun and its ranks take long to start
        signal.signal(each, lambda number, _: asked.append(number))
    began = time.time()
    run = RunDirectory(Path(run_directory))
    first = os.environ.get("PET_NODE_RANK", "0") == "0"
    if first:
        with run.held():  # for as long as that takes: the run's rank 0 holds it then
            run.announce()  # what stands in status.json afterwards is of this attempt
    before = run.status()
    ended = _run(command, run.path, asked)
    code = _verdict(ended, before, run.status())
    if code is None and asked and not run.stepped_since(began):
        code = STOPPED
        if first:
            name = signal.Signals(asked[0]).name
            run.end(code, f"stopped by {name} before it took a step: start it again")
    return 1 if code is None else code


def _run(command: Sequence[str], run: Path, asked: Sequence[int]) -> int:
    """Its exit code; signals are handed on, each once: torchrun takes a second one for impatience."""
    child = subprocess.Popen(command, env=os.environ | {RUN: str(run)})
    handed_on: set[int] = set()
    while True:
        for number in set(asked) - handed_on:
            handed_on.add(number)
            child.send_signal(number)
        try:
            return child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue


def _verdict(ended: int, before: dict[str, Any] | None, after: dict[str, Any] | None) -> int | None:
    """What the run says of itself; None where this attempt ended without a word."""
    if ended == 0:
        return 0
    code = (after or {}).get("code")
    if after == before or not isinstance(code, int):  # what stood there before is another attempt's
        return None
    return code or 1


def _guarded() -> int:
    from dsplugins.contracts import EnvironmentUnfit

    try:
        return main(sys.argv[1], sys.argv[2:])
    except EnvironmentUnfit as error:
        print(f"this machine can't run it: {error}", file=sys.stderr)
        return 4


if __name__ == "__main__":
    sys.exit(_guarded())
