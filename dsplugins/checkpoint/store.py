"""Checkpoints in a run directory: written whole or not at all, checked before they count, verified when read.

`checkpoints/step-00000120/` holds one data file a rank and DCP's `.metadata`, and `manifest.json`: where the
run stood, and size and SHA-256 of each file and of itself. A checkpoint is written beside it under a name
that ends in `.partial`; the manifest is made from what can be read back, and the rename to the final name is
what makes the checkpoint count. Whoever is killed at any instant leaves a partial folder or a whole one.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dsplugins.checkpoint import manifest, room
from dsplugins.checkpoint.pieces import Piece
from dsplugins.checkpoint.planners import PieceLoader, PieceSaver, Unfit
from dsplugins.contracts import Problem, RecipeError

_NAME = re.compile(r"step-(\d{8,})")
PARTIAL = ".partial"
DAMAGED = ".damaged"


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint on disk."""

    path: Path
    step: int

    def manifest(self) -> dict[str, Any]:
        """What `manifest.json` says; see `manifest.read`."""
        return manifest.read(self.path, self.step)


def finished(folder: Path) -> list[Checkpoint]:
    """Checkpoints that count, the newest first."""
    found = [(entry, _NAME.fullmatch(entry.name)) for entry in folder.glob("step-*")]
    counted = [Checkpoint(entry, int(match[1])) for entry, match in found if match]
    return sorted(counted, key=lambda checkpoint: -checkpoint.step)


def clear_partial(folder: Path) -> None:
    """Remove what was being written when a run ended."""
    _remove(folder.glob(f"step-*{PARTIAL}"))


def clear(folder: Path) -> None:
    """Remove every checkpoint, and nothing else: the folder may be a link to where others keep theirs."""
    _remove(folder.glob("step-*"))


def _remove(entries: Iterable[Path]) -> None:
    for entry in [*entries]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def save(
    folder: Path, step: int, held: Sequence[Piece], facts: Mapping[str, Any], group: dist.ProcessGroup
) -> Checkpoint:
    """Write a checkpoint; collective over `group` (gloo, all ranks), also from a thread of its own.

    Raises on all ranks when one of them can't write. What was written is removed then, for the room that it
    takes, and nothing finished is touched.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    rank = dist.get_rank(group)
    together(group, lambda: _fresh(partial, final) if rank == 0 else None)
    try:
        _write(partial, held, group)
        mine = together(group, lambda: _read_back(partial, rank))
        files = {name: seen for each in mine for name, seen in each.items()}
        together(group, lambda: _commit(partial, final, step, files, facts) if rank == 0 else None)
    except OSError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier(group)
        raise
    return Checkpoint(final, step)


def _write(partial: Path, held: Sequence[Piece], group: dist.ProcessGroup) -> None:
    """All ranks' pieces. Raises OSError on all of them where one can't."""
    writer, rank = dcp.FileSystemWriter(partial, sync_files=True), dist.get_rank(group)
    try:
        dcp.save({}, storage_writer=writer, planner=PieceSaver(held), process_group=group)
    except dcp.CheckpointException as error:
        full = "; ".join(filter(None, together(group, lambda: room.lacking(partial, rank, held))))
        raise OSError(f"{partial.stem} can't be written: {full or _told(error)}") from error


def load(checkpoint: Checkpoint, held: Sequence[Piece], group: dist.ProcessGroup) -> list[str]:
    """Fill `held` from a checkpoint of any layout; the names in it that no rank holds. Collective.

    Raises RecipeError on all ranks where one of them needs what it doesn't hold; nothing is filled then.
    """
    reader, loader = dcp.FileSystemReader(checkpoint.path), PieceLoader(held)
    try:
        dcp.load({}, storage_reader=reader, planner=loader, process_group=group)
    except dcp.CheckpointException as error:
        said = f"{checkpoint.path} doesn't fit this run: {_told(error)}"
        remedy = "give the sizes and plugins that it was saved with, or train from the start elsewhere"
        raise RecipeError([Problem(said, "model", remedy)]) from error
    return _wanted_by_nobody(loader, group)


def _wanted_by_nobody(loader: PieceLoader, group: dist.ProcessGroup) -> list[str]:
    """Of the names in a checkpoint, those that no rank loads. As flags: names of all ranks would be many."""
    names, wanted = loader.stored(), loader.wanted()
    unwanted = torch.tensor([name not in wanted for name in names], dtype=torch.uint8)
    dist.all_reduce(unwanted, op=dist.ReduceOp.MIN, group=group)
    return [name for name, out in zip(names, unwanted.tolist(), strict=True) if out]


def _told(error: dcp.CheckpointException) -> str:
    """What went wrong on the ranks where it did, each thing once."""
    causes = {
        str(cause) if isinstance(cause, Unfit) else f"{type(cause).__name__}: {cause}"
        for cause, _ in error.failures.values()
    }
    return "; ".join(sorted(causes))


def newest_good(
    folder: Path, group: dist.ProcessGroup, step: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are as they were written, and what is wrong with newer ones.

    With `step` only that of this step counts. Collective over `group`: the ranks share the reading.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    damaged: list[str] = []
    counted = [c for c in finished(folder) if step in (None, c.step)] if rank == 0 else None
    shared: list[Any] = [counted]
    dist.broadcast_object_list(shared, group_src=0, group=group)
    for checkpoint in shared[0]:
        found = together(group, bound(_faults, checkpoint, rank, ranks))
        faults = sorted({fault for each in found for fault in each})
        if not faults:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.path} is damaged ({'; '.join(faults)})")
    return None, damaged


def set_aside(folder: Path, above: int) -> None:
    """Take checkpoints of steps above `above`, which are damaged, out of the count: they must not push good
    ones out. They stay on disk as `step-N.damaged`."""
    for checkpoint in finished(folder):
        if checkpoint.step > above:
            aside = checkpoint.path.with_name(checkpoint.path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint.path, aside)


def prune(folder: Path, keep: int, keep_every: int) -> list[Checkpoint]:
    """Remove all but the newest `keep` and those at multiples of `keep_every` steps (0: none)."""
    gone = [c for c in finished(folder)[keep:] if not keep_every or c.step % keep_every]
    for checkpoint in gone:
        # First a name that doesn't count: a half-removed checkpoint must never be found.
        doomed = checkpoint.path.with_name(checkpoint.path.name + PARTIAL)
        os.rename(checkpoint.path, doomed)
        shutil.rmtree(doomed)
    return gone


def _fresh(partial: Path, final: Path) -> None:
    if final.exists():  # a run goes on from its newest, and sets aside what is newer: this is somebody else's
        raise FileExistsError(
            errno.EEXIST, "there already, and no finished checkpoint is replaced", str(final)
        )
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _read_back(partial: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and digest of this rank's files, and on rank 0 of the table of contents, as read from disk."""
    files = list(partial.glob(f"__{rank}_*"))
    if rank == 0:
        files.append(partial / ".metadata")
    return {file.name: manifest.seen(file) for file in files}


def _commit(
    partial: Path, final: Path, step: int, files: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    manifest.write(partial, step, files, facts)
    _sync_folder(partial)
    os.rename(partial, final)  # which replaces no folder that holds anything
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    """What has been renamed in a folder is on disk only when the folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _faults(checkpoint: Checkpoint, rank: int, ranks: int) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        files = checkpoint.manifest()["files"]
    except OSError as error:
        return [f"{manifest.MANIFEST}: {error.strerror or type(error).__name__}"]
    except ValueError as error:
        return [f"{manifest.MANIFEST}: {error}"]
    return [
        f"{name}: {fault}"
        for name, expected in sorted(files.items())[rank::ranks]
        if (fault := manifest.fault(checkpoint.path / name, expected))
    ]


def together(group: dist.ProcessGroup, work: Any) -> list[Any]:
    """What `work` returned on each rank. Raises on all ranks, naming those, where it failed on some.

    OSError where nothing but files and folders were in the way, else RuntimeError.
    """
    try:
        outcome: tuple[Any, str, type[Exception]] = (work(), "", OSError)
    except OSError as error:
        said = f"{error.strerror}: {error.filename}" if error.strerror else str(error) or type(error).__name__
        outcome = (None, said, OSError)
    except Exception as error:  # the others wait: whatever it is, they must hear of it
        outcome = (None, f"{type(error).__name__}: {error}", RuntimeError)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, outcome, group=group)
    failed = [(f"rank {rank}: {said}", kind) for rank, (_, said, kind) in enumerate(everyone) if said]
    if failed:
        kind = RuntimeError if any(kind is RuntimeError for _, kind in failed) else OSError
        raise kind("; ".join(said for said, _ in failed))
    return [value for value, *_ in everyone]


__all__ = [
    *("Checkpoint", "clear", "clear_partial", "finished", "load", "newest_good"),
    *("prune", "save", "set_aside", "together"),
]
