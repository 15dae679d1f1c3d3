"""A corpus as megatron-core reads it, with what is wrong with its files told."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsplugins.contracts import EnvironmentUnfit

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from dsplugins.corpora.sidecar import Sidecar

PIECE = 1 << 20
"""Numbers of an index that are looked at together."""
AGAIN = "copy the corpus again, or build it again"


def opened(prefix: Path) -> IndexedDataset:
    """megatron-core's own.

    Raises EnvironmentUnfit for another format, for numbers that no index has, and for files of two corpora.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        corpus = IndexedDataset(str(prefix))
    except (AssertionError, ValueError, struct.error) as error:
        said = str(error) or "its counts don't fit together"
        raise EnvironmentUnfit(f"{prefix} is not in megatron-core's format: {said}") from error
    if fault := _fault(corpus):
        raise EnvironmentUnfit(f"{prefix}.idx is damaged: {fault}; {AGAIN}")
    tokens, there = prefix.with_name(prefix.name + ".bin"), _size(corpus)
    if tokens.stat().st_size != there:
        raise EnvironmentUnfit(
            f"{tokens} has {tokens.stat().st_size:,} bytes, and {there:,} by its index: copy both again"
        )
    return corpus


def _fault(corpus: IndexedDataset) -> str | None:
    """What can't be: a sequence begins where the one before it ends, and documents are whole sequences.

    A piece at a time: an index may be as large as memory.
    """
    index, count = corpus.index, len(corpus.index.sequence_lengths)
    end = 0
    for start in range(0, count, PIECE):
        lengths = index.sequence_lengths[start : start + PIECE].astype(np.int64)
        if (wrong := np.flatnonzero(lengths < 0)).size:
            return f"sequence {start + wrong[0]} has {lengths[wrong[0]]} tokens"
        ends = end + np.cumsum(lengths * index.dtype_size)
        begins = np.concatenate(([end], ends[:-1]))
        if (wrong := np.flatnonzero(index.sequence_pointers[start : start + PIECE] != begins)).size:
            return f"sequence {start + wrong[0]} does not begin where the one before it ends"
        end = int(ends[-1])
    documents = index.document_indices
    ordered = all(
        (np.diff(documents[start : start + PIECE + 1]) >= 0).all()
        for start in range(0, len(documents), PIECE)
    )
    if not len(documents) or documents[0] != 0 or documents[-1] != count or not ordered:
        return "its documents are not all of its sequences, in order"
    return None


def changed(prefix: Path, described: Sidecar) -> list[str]:
    """Files of a corpus that are not as they were when their digests were taken. Reads all of them."""
    found = []
    for end, file in described.files.items():
        path = prefix.with_name(f"{prefix.name}.{end}")
        if not path.is_file():
            found.append(f"{path} is not there")
            continue
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != file["sha256"]:
            found.append(f"{path} has SHA-256 {digest[:12]}..., and {file['sha256'][:12]}... by its sidecar")
    return found


def _size(corpus: IndexedDataset) -> int:
    """Bytes of the tokens: where the last sequence ends."""
    index = corpus.index
    if not len(index.sequence_lengths):
        return 0
    return int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size


__all__ = ["AGAIN", "changed", "opened"]
