"""A corpus as megatron-core reads it, with what is wrong with its files told."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from dsplugins.contracts import EnvironmentUnfit

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset


def opened(prefix: Path) -> IndexedDataset:
    """megatron-core's own. Raises EnvironmentUnfit for another format, and for files of two corpora."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        corpus = IndexedDataset(str(prefix))
    except (AssertionError, ValueError, struct.error) as error:
        raise EnvironmentUnfit(f"{prefix} is not in megatron-core's format: {error}") from error
    tokens, there = prefix.with_name(prefix.name + ".bin"), _size(corpus)
    if tokens.stat().st_size != there:
        raise EnvironmentUnfit(
            f"{tokens} has {tokens.stat().st_size:,} bytes, and {there:,} by its index: copy both again"
        )
    return corpus


def _size(corpus: IndexedDataset) -> int:
    """Bytes of the tokens: where the last sequence ends."""
    index = corpus.index
    if not len(index.sequence_lengths):
        return 0
    return int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size


__all__ = ["opened"]
