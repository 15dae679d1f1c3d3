"""Which documents a corpus is made of: inputs -> pieces of files, the same whatever reads them."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

LINES = (".jsonl", ".ndjson")
"""Endings of files with one JSON object a line; every other file is one document."""
PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip", ".parquet")
PIECE = 1 << 20
"""Bytes that are worth sending to another process."""


@dataclass(frozen=True)
class File:
    """One input file."""

    path: Path
    name: str
    """Below the folder that was given, with `/`, or the file's own: what documents are named after.

    Another input's file of the same name is `NAME#2`, the next `NAME#3`.
    """
    size: int

    @property
    def lines(self) -> bool:
        """Whether a line is a document, not the file."""
        return self.path.suffix.lower() in LINES


@dataclass(frozen=True)
class Piece:
    """Whole lines of a file, or all of it. Of more than `PIECE` bytes: one document."""

    file: File
    start: int = 0
    stop: int = 0
    """Bytes [start, stop)."""
    first_line: int = 1
    """Number of the line at `start`."""

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stop - self.start

    @property
    def place(self) -> str:
        """Where it begins, for people."""
        return f"{self.file.path}:{self.first_line}" if self.file.lines else str(self.file.path)


def find(inputs: Sequence[Path], patterns: Sequence[str]) -> list[File]:
    """Files of the inputs: a file itself, a folder's files whose names match, sorted by name.

    Raises ValueError for an input without files, for packed ones, for pipes, and for a file given twice.
    """
    files: list[File] = []
    for given in inputs:
        if given.exists() and not (given.is_dir() or given.is_file()):
            raise ValueError(f"{given} is a pipe or the like: write it to a file first")
        found = list(_below(given, patterns)) if given.is_dir() else [File(given, given.name, _size(given))]
        if not found:
            raise ValueError(f"{given} has no files like {', '.join(patterns)}: give a --pattern")
        files += found
    twice = [path for path, count in Counter(file.path.resolve() for file in files).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    packed = next((file.path for file in files if file.path.suffix.lower() in PACKED), None)
    if packed:
        raise ValueError(f"{packed} is packed: unpack it first, inputs are JSONL or plain text")
    return list(_told_apart(files))


def left_out(inputs: Sequence[Path], patterns: Sequence[str]) -> Counter[str]:
    """What stands in the folders of the inputs and is not read: ending, or kind -> how many."""
    below = (path for given in inputs if given.is_dir() for path in given.rglob("*"))
    return Counter(kind for path in below if (kind := _unread(path, patterns)))


def _unread(path: Path, patterns: Sequence[str]) -> str | None:
    if path.is_file():
        ending = "".join(path.suffixes[-2:] if path.suffix in PACKED else path.suffixes[-1:])
        return None if _matches(path, patterns) else ending or "without an ending"
    if path.is_symlink():
        return "link to a folder" if path.exists() else "broken link"
    return None if path.is_dir() else "neither file nor folder"


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns)


def _told_apart(files: Sequence[File]) -> Iterator[File]:
    """Equal names would be drawn alike: both documents in fill-in-middle form or neither, cut alike."""
    seen: Counter[str] = Counter()
    for file in files:
        seen[file.name] += 1
        yield replace(file, name=f"{file.name}#{seen[file.name]}") if seen[file.name] > 1 else file


def _below(folder: Path, patterns: Sequence[str]) -> Iterator[File]:
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(paths):
        if _matches(paths[name], patterns):
            yield File(paths[name], name, _size(paths[name]))


def _size(path: Path) -> int:
    return path.stat().st_size


def tasks(files: Sequence[File], size: int = PIECE) -> Iterator[tuple[Piece, ...]]:
    """Pieces in order, in bundles of about `size` bytes; files alone decide where they are cut."""
    bundle: list[Piece] = []
    held = 0
    for file in files:
        for piece in _cut(file, size) if file.lines else (Piece(file, 0, file.size),):
            bundle.append(piece)
            held += piece.size
            if held >= size:
                yield tuple(bundle)
                bundle, held = [], 0
    if bundle:
        yield tuple(bundle)


def _cut(file: File, size: int) -> Iterator[Piece]:
    """A file of lines in pieces of whole ones that fit into `size` bytes; a longer line is a piece."""
    start, line = 0, 1
    if not os.access(file.path, os.R_OK):
        yield Piece(file, 0, file.size)  # whoever reads it will say so
        return
    with file.path.open("rb") as stream:
        while block := stream.read(size):
            whole = block.rfind(b"\n") + 1
            stop, lines = start + (whole or len(block)), block.count(b"\n", 0, whole)
            while not whole and (block := stream.readline(size)):
                stop += len(block)
                whole = lines = block.count(b"\n")
            stream.seek(stop)
            yield Piece(file, start, stop, line)
            start, line = stop, line + lines


__all__ = ["File", "Piece", "find", "left_out", "tasks"]
