"""The first process of a pod: `python -m dsplugins.launching.pod RUN_DIRECTORY COMMAND ...`.

Runs torchrun (COMMAND), hands it the signals that Kubernetes sends, and leaves with the run's code from
`status.json`, where torchrun makes 1 of every code: Kubernetes starts again after a 75, not after a 3.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsplugins.rundir import RunDirectory

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main(run_directory: str, command: Sequence[str]) -> int:
    """Run `command`; the exit code of the run.

    Raises EnvironmentUnfit if the run directory can't be written.
    """
    run = RunDirectory(Path(run_directory))
    if os.environ.get("PET_NODE_RANK", "0") == "0":
        with run.held():  # for as long as that takes: the run's rank 0 holds it then
            run.announce()  # what stands in status.json afterwards is of this attempt
    before = run.status()
    ended = _run(command)
    return _verdict(ended, before, run.status())


def _run(command: Sequence[str]) -> int:
    """Its exit code; signals are handed on, each once: torchrun takes a second one for impatience."""
    handed_on: set[int] = set()
    asked: list[int] = []
    for each in HANDED_ON:
        signal.signal(each, lambda number, _: asked.append(number))
    child = subprocess.Popen(command)
    while True:
        while asked:
            number = asked.pop(0)
            if number not in handed_on:
                handed_on.add(number)
                child.send_signal(number)
        try:
            return child.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue


def _verdict(ended: int, before: dict[str, Any] | None, after: dict[str, Any] | None) -> int:
    if ended == 0:
        return 0
    code = (after or {}).get("code")
    # What stood there before is another attempt's: this one ended without a word.
    return code if after != before and isinstance(code, int) and code else 1


def _guarded() -> int:
    from dsplugins.contracts import EnvironmentUnfit

    try:
        return main(sys.argv[1], sys.argv[2:])
    except EnvironmentUnfit as error:
        print(f"this machine can't run it: {error}", file=sys.stderr)
        return 4


if __name__ == "__main__":
    sys.exit(_guarded())
