"""Text -> `PREFIX.bin`, `.idx`, `.bytes.npy` and `.json`: all of them or none.

megatron-core's own builder writes the first two. `.bytes.npy`, int64 [documents], holds the bytes of each
document's text, so that a loss can be told in bits a byte on any part of a corpus. Files are written under
temporary names and renamed at the end, the index and the sidecar last. One build of a corpus is at work at a
time (`claim`). The result does not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsplugins.contracts import EnvironmentUnfit
from dsplugins.corpora import sidecar
from dsplugins.corpora.claim import claimed
from dsplugins.corpora.documents import Bad
from dsplugins.corpora.encoding import WIDE, Encoded, Encoder, Unencodable
from dsplugins.corpora.memory import killed, refuse_unfit
from dsplugins.corpora.pool import ProcessLost, ordered
from dsplugins.corpora.sidecar import Sidecar
from dsplugins.corpora.sources import File, Piece, find, tasks
from dsplugins.corpora.tokenizer import TokenizerFile

PARTS = ("bin", "idx", "bytes.npy")
VERSIONS = ("dsplugins", "megatron-core", "numpy", "tokenizers")


BLOCK = 1 << 24
"""Bytes that are digested at once."""


class BuildRefused(ValueError):
    """What was asked for can't be built; nothing was left behind."""


@dataclass(frozen=True)
class Wanted:
    """A corpus that somebody asks for."""

    inputs: tuple[Path, ...]
    tokenizer: TokenizerFile
    out: Path
    """Prefix of the files."""
    patterns: tuple[str, ...] = ("*.jsonl", "*.txt")
    """Files of a folder that are read."""
    key: str = "text"
    fim_rate: float = 0.1
    seed: int = 1234
    skip_bad: bool = False
    """Leave out what can't be taken, instead of failing at the end."""
    overwrite: bool = False


@dataclass
class Progress:
    """What a build has come to; the same object all along."""

    total: int
    """Bytes of all inputs."""
    read: int = 0
    documents: int = 0
    turned: int = 0
    tokens: int = 0
    bytes: int = 0
    unknown: int = 0
    """Tokens that stand for what the tokenizer doesn't know."""
    bad: Counter[str] = field(default_factory=Counter)
    """Reason -> how many."""

    def add(self, part: Encoded) -> None:
        """Count one task's result."""
        self.read += part.read
        self.documents += len(part.lengths)
        self.turned += part.turned
        self.tokens += len(part.tokens)
        self.bytes += int(part.sizes.sum())
        self.unknown += part.unknown
        self.bad.update(bad.reason for bad in part.bad)


def build(
    wanted: Wanted,
    workers: int,
    tell_bad: Callable[[Bad], None],
    tell_progress: Callable[[Progress], None],
    tell: Callable[[str], None],
) -> Sidecar:
    """Build a corpus with so many processes; its sidecar. What can't be taken is told as it is met.

    Progress is told while nothing has moved, too; what that raises ends the build. So does BuildRefused,
    which is raised here, and EnvironmentUnfit: another build is at work on this corpus, a document is too
    large for memory, a process was killed. All leave nothing.
    """
    files = _files(wanted)
    _refuse_tokenizer(wanted)
    _refuse_existing(wanted)
    for file in files:
        if not file.lines:
            refuse_unfit(str(file.path), file.size)
    progress = Progress(sum(file.size for file in files))
    alive = partial(tell_progress, progress)
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    with claimed(wanted.out, tell) as claim, _partial(wanted.out, claim.owner.token) as paths:
        _refuse_existing(wanted)  # again: what another build has made since
        encoder = Encoder(wanted.tokenizer, wanted.key, wanted.fim_rate, wanted.seed)
        sent: deque[Sequence[Piece]] = deque()
        with closing(ordered(encoder, _noted(tasks(files), sent), workers, alive)) as encoded:
            parts = _told(encoded, sent, progress, tell_bad, tell_progress)
            sizes = _write(parts, paths, wanted.tokenizer.vocab_size)
        _refuse_result(wanted, progress)
        with paths["bytes.npy"].open("wb") as stream:
            np.save(stream, sizes)
        made = _sidecar(wanted, files, progress, {part: _file(paths[part], alive) for part in PARTS})
        claim.keep()
        _put(wanted.out, paths, made)
    return made


def _files(wanted: Wanted) -> list[File]:
    try:
        return find(wanted.inputs, wanted.patterns)
    except (ValueError, OSError) as error:
        raise BuildRefused(str(error)) from error


def _refuse_tokenizer(wanted: Wanted) -> None:
    """A tokenizer without the marks that are needed."""
    try:
        ids = wanted.tokenizer.ids
    except ValueError as error:
        raise BuildRefused(str(error)) from error
    needed = [mark for mark in ids if mark == "eos" or wanted.fim_rate > 0]
    for mark in needed:
        if ids[mark] is None:
            option = "--" + mark.replace("_", "-")
            without = "" if mark == "eos" else ", or give --fim-rate 0"
            raise BuildRefused(
                f"{wanted.tokenizer.path} has no token {wanted.tokenizer.marks[mark]}: "
                f"name the one it has with {option}{without}"
            )
    if len({ids[mark] for mark in needed}) < len(needed):
        raise BuildRefused(f"the marks {', '.join(needed)} need tokens of their own")


def _refuse_existing(wanted: Wanted) -> None:
    there = [path for path in (*_places(wanted.out).values(), sidecar.place(wanted.out)) if path.exists()]
    if there and not wanted.overwrite:
        raise BuildRefused(f"{there[0]} is there already: choose another --out, or --overwrite it")
    try:
        sidecar.read(wanted.out)
    except sidecar.SidecarFault as error:
        raise BuildRefused(f"{error}, and is not overwritten: choose another --out") from error


def _refuse_result(wanted: Wanted, progress: Progress) -> None:
    if progress.bad and not wanted.skip_bad:
        told = ", ".join(f"{count} x {reason}" for reason, count in sorted(progress.bad.items()))
        raise BuildRefused(
            f"{progress.bad.total()} of the inputs' documents can't be taken ({told}): nothing was written. "
            "Mend them, or leave them out with --skip-bad"
        )
    if progress.documents == 0:
        raise BuildRefused("the inputs hold no document: nothing was written")


def _noted(tasks: Iterable[Sequence[Piece]], sent: deque[Sequence[Piece]]) -> Iterator[Sequence[Piece]]:
    for task in tasks:
        sent.append(task)
        yield task


def _told(
    parts: Iterable[Encoded],
    sent: deque[Sequence[Piece]],
    progress: Progress,
    tell_bad: Callable[[Bad], None],
    tell_progress: Callable[[Progress], None],
) -> Iterator[Encoded]:
    """The parts; what is `sent` and not among them yet is under way when a process is killed."""
    try:
        for part in parts:
            sent.popleft()
            progress.add(part)
            for bad in part.bad:
                tell_bad(bad)
            tell_progress(progress)
            yield part
    except ProcessLost as error:
        raise EnvironmentUnfit(killed(piece for task in sent for piece in task)) from error


def _write(parts: Iterable[Encoded], paths: dict[str, Path], vocab_size: int) -> NDArray[np.int64]:
    """Write `.bin` and `.idx` with megatron-core's builder; bytes of each document."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(vocab_size)
    assert (dtype is np.uint16) == (vocab_size < WIDE), "encoding.py says what core writes"
    builder = IndexedDatasetBuilder(str(paths["bin"]), dtype=dtype)
    sizes = [np.empty(0, np.int64)]
    try:
        for part in parts:
            ends = np.cumsum(part.lengths)
            for start, end in zip(ends - part.lengths, ends, strict=True):
                builder.add_document(part.tokens[start:end], [int(end - start)])
            sizes.append(part.sizes)
    except Unencodable as error:
        raise BuildRefused(f"{error}; nothing was written") from error
    finally:
        builder.finalize(str(paths["idx"]))
    return np.concatenate(sizes)


def _sidecar(
    wanted: Wanted, files: Sequence[File], progress: Progress, made: dict[str, dict[str, Any]]
) -> Sidecar:
    tokenizer = wanted.tokenizer
    return Sidecar(
        tokenizer=str(tokenizer.path.resolve()),
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        marks=dict(tokenizer.marks),
        mark_ids=tokenizer.ids,
        fim_rate=wanted.fim_rate,
        seed=wanted.seed,
        documents=progress.documents,
        fim_documents=progress.turned,
        tokens=progress.tokens,
        bytes=progress.bytes,
        skipped=dict(sorted(progress.bad.items())),
        key=wanted.key,
        inputs=tuple(_input(given, files) for given in wanted.inputs),
        files=made,
        versions={name: metadata.version(name) for name in VERSIONS},
    )


def _input(given: Path, files: Sequence[File]) -> dict[str, Any]:
    mine = [file.size for file in files if file.path == given or given in file.path.parents]
    return {"path": str(given), "files": len(mine), "bytes": sum(mine)}


def _file(path: Path, alive: Callable[[], None]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            alive()
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _places(out: Path) -> dict[str, Path]:
    return {part: out.with_name(f"{out.name}.{part}") for part in PARTS}


@contextmanager
def _partial(out: Path, token: str) -> Iterator[dict[str, Path]]:
    """Temporary names; what still has them at the end is removed, and what a build left that was killed."""
    paths = {part: out.with_name(f"{out.name}.{part}.{token}.partial") for part in (*PARTS, "json")}
    for left in out.parent.iterdir():
        if re.fullmatch(
            rf"{re.escape(out.name)}\.(bin|idx|bytes\.npy|json)\.[0-9a-f]{{8}}\.partial", left.name
        ):
            left.unlink(missing_ok=True)
    try:
        yield paths
    finally:
        for path in paths.values():
            path.unlink(missing_ok=True)


def _put(out: Path, paths: dict[str, Path], made: Sidecar) -> None:
    """Old sidecar and index go first: they must never stand beside new files, and nothing opens without."""
    final, places = sidecar.place(out), _places(out)
    paths["json"].write_text(made.text())
    for path in paths.values():
        _on_disk(path)
    final.unlink(missing_ok=True)
    places["idx"].unlink(missing_ok=True)
    for part in ("bin", "bytes.npy", "idx"):
        os.replace(paths[part], places[part])
    os.replace(paths["json"], final)


def _on_disk(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


__all__ = ["BuildRefused", "Progress", "Wanted", "build"]
