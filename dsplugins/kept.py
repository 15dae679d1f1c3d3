"""Files that a run left, read back. What is damaged is one problem: the file, what is wrong, what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsplugins.contracts import Problem, RecipeError

COPY = "put back a copy of it, or move it away"
LINE = "mend that line, or remove it"


def damaged(path: Path, said: str, remedy: str = COPY) -> RecipeError:
    """To be raised; exit code 4."""
    return RecipeError([Problem(said, remedy=remedy, place=str(path), kind="environment")])


def mapping(path: Path, remedy: str = COPY) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or RecipeError where it is damaged."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        said = f"is not JSON: {error}" if path.stat().st_size else "is empty"
        raise damaged(path, said, remedy) from error
    if not isinstance(found, dict):
        raise damaged(path, "is not a JSON object", remedy)
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    """A JSON object a line; none where there is no file.

    The last line counts if it is whole: a run may be writing it, or have lost its power there. Raises
    RecipeError for any other line that is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    found = [_row(line) for line in lines]
    if lines and not lines[-1].endswith(b"\n"):
        found[-1] = None
    if found and found[-1] is None:
        found.pop()
    whole = [row for row in found if row is not None]
    if len(whole) < len(found):
        raise damaged(path, f"line {found.index(None) + 1} is damaged", LINE)
    return whole


def steps(path: Path) -> list[dict[str, Any]]:
    """`rows` of a log of steps. Raises RecipeError for one that doesn't tell its step, too."""
    found = rows(path)
    for number, row in enumerate(found, 1):
        if not isinstance(row.get("step"), int):
            raise damaged(path, f"line {number} tells no step", LINE)
    return found


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


__all__ = ["COPY", "LINE", "damaged", "mapping", "rows", "steps"]
