"""`manifest.json` of a checkpoint: its step, size and digest of each file, and its own digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
OTHER = "other content than was written"


def write(folder: Path, step: int, files: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Have it on disk in `folder`; `files` are those of `seen`."""
    said = {**facts, "step": step, "files": files}
    with (folder / MANIFEST).open("w") as stream:
        json.dump({**said, "sha256": _digest(said)}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def read(folder: Path, step: int) -> dict[str, Any]:
    """What it says. Raises OSError, or ValueError where it isn't as it was written, or is another step's."""
    try:
        said = json.loads((folder / MANIFEST).read_text())
    except ValueError as error:
        raise ValueError("is not JSON") from error
    if not isinstance(said, dict) or said.pop("sha256", None) != _digest(said):
        raise ValueError(OTHER)
    if said["step"] != step:
        raise ValueError(f"is of step {said['step']}")
    return said


def seen(file: Path) -> dict[str, Any]:
    """Size and digest of a file, as read from disk."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def fault(file: Path, expected: Mapping[str, Any]) -> str | None:
    """What tells it from the file that was `seen`."""
    try:
        if file.stat().st_size != expected["bytes"]:
            return f"{file.stat().st_size} bytes instead of {expected['bytes']}"
        return None if seen(file) == expected else OTHER
    except OSError as error:
        return error.strerror or type(error).__name__


def _digest(said: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in it, in an order and form of its own."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


__all__ = ["MANIFEST", "fault", "read", "seen", "write"]
