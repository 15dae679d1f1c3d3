"""Processes of `dsplugins check`: a request on stdin, an answer in a file, and honesty about a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dsplugins.cli import exits

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAST_LINES = 12
"""Of a crashed child's output; `--debug` shows all of it."""


class ChildFailed(RuntimeError):
    """A child process ended without an answer; the message says why, or has its last lines."""


class Child:
    """A running `python -m MODULE ANSWER`; `answer` waits for it."""

    def __init__(self, module: str, request: dict[str, Any], environment: dict[str, str]) -> None:
        self.module = module
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "answer.json"
        self._request = json.dumps(request)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(self._file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        """Its answer. Raises ChildFailed with its last lines if it gave none."""
        said, _ = self._process.communicate(self._request)
        with self._folder:
            code = self._process.returncode
            if code == 0 and self._file.exists():
                found: dict[str, Any] = json.loads(self._file.read_text())
                return found
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        lines = said.splitlines()
        if exits.DEBUG not in os.environ:
            lines = lines[-LAST_LINES:]
        shown = "\n".join(f"    {line}" for line in lines)
        raise ChildFailed(f"the child process {self.module} {how}; its last lines:\n{shown}")


def start(module: str, request: dict[str, Any], without_gpu: bool = False) -> Child:
    """Start `module`; `without_gpu` hides GPUs and turns torch.compile off, which nothing here needs."""
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    if without_gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return Child(module, request, environment)


__all__ = ["Child", "ChildFailed", "start"]
