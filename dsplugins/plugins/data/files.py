"""Which files the corpus is made of, and which of them are held out."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.corpora.draws import draws, shuffled

# Installed packages differ from machine to machine; the build's own settings hold its paths.
NOT_LIBRARY = ("site-packages", "dist-packages", "__pycache__", "config-*", "_sysconfigdata*.py")
TESTS = ("test", "tests", "idle_test")


@dataclass(frozen=True)
class Document:
    """One source file."""

    name: str
    """Path below the corpus folder, with `/`: what split, FIM and order are drawn from."""
    content: bytes
    """Never empty."""


@dataclass(frozen=True)
class Split:
    """Training and held-out documents, each sorted by name."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all names and contents and of the split: equal digests, equal corpora."""
        total = hashlib.sha256()
        for part, documents in ((b"train", self.train), (b"validation", self.validation)):
            for document in documents:
                name = document.name.encode("utf-8", "surrogateescape")
                total.update(part + b"\0" + name + b"\0" + hashlib.sha256(document.content).digest())
        return total.hexdigest()


def standard_library() -> Path:
    """Folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


@functools.lru_cache(maxsize=1)
def library_documents(*, tests: bool, max_bytes: int | None) -> tuple[Document, ...]:
    """Those of the standard library, which doesn't change while this interpreter runs."""
    return read_documents(standard_library(), tests=tests, max_bytes=max_bytes)


def read_documents(root: Path, *, tests: bool, max_bytes: int | None) -> tuple[Document, ...]:
    """Non-empty `*.py` files below `root`, sorted by name; of equal contents the first only.

    With `max_bytes` a subset that the names alone decide, at most so large. Raises
    EnvironmentUnfit when there is no source at all (some images ship bytecode only).
    """
    if not root.is_dir():
        raise EnvironmentUnfit(f"{root} is not a folder; no Python sources to train on")
    found = tuple(_distinct(Document(name, path.read_bytes()) for name, path in _sources(root, tests)))
    if not found:
        raise EnvironmentUnfit(
            f"no Python sources below {root}; was Python installed without its *.py files?"
        )
    return found if max_bytes is None else _at_most(found, max_bytes)


def split_documents(documents: Iterable[Document], share: float) -> Split:
    """Hold out about `share` of the files. A file's side depends on its name alone."""
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        held_out = draws("split", document.name)[0] < share
        (validation if held_out else train).append(document)
    return Split(tuple(train), tuple(validation))


def _sources(root: Path, tests: bool) -> list[tuple[str, Path]]:
    skipped = NOT_LIBRARY if tests else NOT_LIBRARY + TESTS
    found = []
    for folder, folders, files in root.walk():
        folders[:] = [name for name in folders if not _matches(name, skipped)]
        inside = folder.relative_to(root)
        names = (name for name in files if name.endswith(".py") and not _matches(name, skipped))
        found += [((inside / name).as_posix(), folder / name) for name in names]
    return sorted(found)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _distinct(documents: Iterable[Document]) -> Iterator[Document]:
    # A copy of a training file on the held-out side would be a leak.
    seen = set()
    for document in documents:
        if document.content and document.content not in seen:
            seen.add(document.content)
            yield document


def _at_most(documents: Sequence[Document], max_bytes: int) -> tuple[Document, ...]:
    chosen, total = [], 0
    for i in shuffled([document.name for document in documents], "subset"):
        if total + len(documents[i].content) <= max_bytes:
            chosen.append(documents[i])
            total += len(documents[i].content)
    return tuple(sorted(chosen, key=lambda document: document.name))
