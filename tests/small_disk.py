"""A file system of a few bytes, for a process that takes itself out of the others' view first."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        line = ["unshare", "-rm", "sh", "-c", "mkdir -p mounted && mount -t tmpfs none mounted"]
        return not subprocess.run(line, cwd=folder, capture_output=True).returncode


needed = pytest.mark.skipif(
    not shutil.which("unshare") or not _can_mount(), reason="can't mount a small file system here"
)


_PATH = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(_PATH)}
"""Of a script that imports this."""


def alone() -> None:
    """What this process and its children mount from here on is theirs."""
    ids = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS)
    for file, line in ids.items():
        Path("/proc/self", file).write_text(line)


def mount(folder: Path, size: str, again: bool = False) -> None:
    """A disk of that size; `again`: the one that is there gets another."""
    options = f"{'remount,' if again else ''}size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
