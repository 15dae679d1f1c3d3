"""Pieces of files -> documents, or what is wrong with a line, with its place."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsplugins.corpora.sources import Piece


@dataclass(frozen=True)
class Document:
    """One text."""

    name: str
    """`below/folder.txt`, or `below/folder.jsonl:LINE`: what fill-in-middle is drawn from."""
    text: str
    size: int
    """Bytes in UTF-8, at least 1."""


@dataclass(frozen=True)
class Bad:
    """A document that can't be taken."""

    path: str
    line: int
    reason: str
    """One of a few, so that they can be counted."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class Unusable(ValueError):
    """(reason, detail) of a text that can't be taken."""


def documents(piece: Piece, key: str) -> Iterator[Document | Bad]:
    """In the order of the file, without empty lines. A file that can't be read is one bad line."""
    try:
        with piece.file.path.open("rb") as stream:
            stream.seek(piece.start)
            content = stream.read(piece.stop - piece.start)
    except OSError as error:
        yield Bad(str(piece.file.path), piece.first_line, "can't be read", error.strerror or "")
        return
    if piece.start == 0:
        content = content.removeprefix(BOM_UTF8)
    if not piece.file.lines:
        yield _whole(piece, content, key)
        return
    for line, raw in enumerate(content.removesuffix(b"\n").split(b"\n"), piece.first_line):
        if not raw.strip():
            continue
        try:
            text, size = _checked(_value(_decoded(raw), key))
            yield Document(f"{piece.file.name}:{line}", text, size)
        except Unusable as error:
            yield Bad(str(piece.file.path), line, *error.args)


def _whole(piece: Piece, content: bytes, key: str) -> Document | Bad:
    if _starts_with_row(content, key):
        name, said = (
            str(piece.file.path),
            f"it has the key {key!r}: name it .jsonl, and each line is a document",
        )
        return Bad(name, 1, "a line of JSON in a file that is no .jsonl", said)
    try:
        text, size = _checked(_decoded(content))
    except Unusable as error:
        return Bad(str(piece.file.path), _line_of_fault(content), *error.args)
    return Document(piece.file.name, text, size)


def _starts_with_row(content: bytes, key: str) -> bool:
    """Whether the first line is one of a JSONL file, whatever the file is called."""
    if not content.startswith(b"{"):
        return False
    try:
        return isinstance(_value(_decoded(content.partition(b"\n")[0]), key), str)
    except Unusable:
        return False


def _line_of_fault(content: bytes) -> int:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 1


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Unusable("not UTF-8", f"byte {raw[error.start]:#04x} at {error.start}") from None


def _value(line: str, key: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Unusable("not JSON", str(error)) from None
    if not isinstance(row, dict):
        raise Unusable("not a JSON object")
    if key not in row:
        raise Unusable(f"no key {key!r}", f"it has {', '.join(sorted(row)[:5])}" if row else "it has none")
    return row[key]


def _checked(text: Any) -> tuple[str, int]:
    """A text and its bytes."""
    if not isinstance(text, str):
        raise Unusable("not a text", f"it is a {type(text).__name__}")
    if not text:
        raise Unusable("empty text")
    try:
        return text, len(text.encode())
    except UnicodeEncodeError:
        raise Unusable("half a surrogate pair") from None


__all__ = ["Bad", "Document", "documents"]
