"""Memory that one document takes while it becomes tokens, and what is free for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from dsplugins import words
from dsplugins.contracts import EnvironmentUnfit
from dsplugins.corpora.sources import Piece

TIMES = 85
"""Bytes that a byte of a document takes at least: the tokenizers library holds a text whole, with the place
of each byte and each token. Measured: 87 (prose of a vocabulary's own words) to 199 (letters at random)."""
LARGE = 1 << 22
"""Bytes of a document from which on memory is looked at; such a piece is one document."""
SPLIT = "split it into documents, a file each or a line of a *.jsonl each"


def refuse_unfit(place: str, size: int) -> None:
    """Raise EnvironmentUnfit for a document of so many bytes that can't be encoded in what is free."""
    free = available() if size >= LARGE else None
    if free is not None and size * TIMES > free:
        raise EnvironmentUnfit(f"{_needs(place, size)}, and {words.size(free)} are free: {SPLIT}")


def killed(pieces: Iterable[Piece]) -> str:
    """What is said of a process that was killed while these were worked at."""
    said = "one of the processes was killed (out of memory?), and nothing was written"
    largest = max(pieces, key=lambda piece: piece.size, default=None)
    if largest is None or largest.size < LARGE:
        return f"{said}: take fewer --workers"
    return f"{said}. {_needs(largest.place, largest.size)}: {SPLIT}, or take fewer --workers"


def available(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take, of the machine and its control groups; None: none tells."""
    return min((*_machine(root), *_groups(root)), default=None)


def _machine(root: Path) -> Iterator[int]:
    kib = _numbers(root / "proc/meminfo").get("MemAvailable:")
    if kib is not None:
        yield kib * 1024


def _groups(root: Path) -> Iterator[int]:
    """Of each group that has a limit, as Slurm and Kubernetes set it. Files that were read are given back."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, cached = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, cached = root / "sys/fs/cgroup/memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *(above for above in group.parents if above.is_relative_to(top))):
            most, now = _text(folder / limit).strip(), _text(folder / used).strip()
            if most.isdigit() and now.isdigit():
                yield max(0, int(most) - int(now) + _numbers(folder / "memory.stat").get(cached, 0))


def _numbers(file: Path) -> dict[str, int]:
    """First and second word of each line."""
    rows = (line.split() for line in _text(file).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _needs(place: str, size: int) -> str:
    told = words.size(size), words.size(size * TIMES)
    return f"{place} is one document of {told[0]}, which takes {told[1]} of memory or more"


__all__ = ["available", "killed", "refuse_unfit"]
