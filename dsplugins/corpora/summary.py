"""What is in a corpus: counts, lengths, decoded samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsplugins.corpora import sidecar
from dsplugins.corpora.reading import opened
from dsplugins.corpora.sidecar import Sidecar
from dsplugins.corpora.tokenizer import TokenizerFile

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
SHOWN = 400
"""Tokens of a sample that are decoded."""


@dataclass(frozen=True)
class Summary:
    """A corpus, looked at."""

    documents: int
    tokens: int
    dtype: str
    lengths: dict[str, int]
    """Quantile -> tokens of a document."""
    histogram: tuple[tuple[int, int], ...]
    """(2^k, documents of 2^k to 2^(k+1) - 1 tokens)."""
    sidecar: Sidecar | None
    samples: tuple[dict[str, Any], ...]
    """`document`, `tokens`, `fim`, and the beginning as `text`."""


def look(prefix: Path, samples: int, tokenizer: TokenizerFile | None) -> Summary:
    """Read the index, and `samples` documents that lie evenly spread. Without a tokenizer none is decoded.

    Raises EnvironmentUnfit for files that can't be read.
    """
    corpus = opened(prefix)
    lengths = corpus.sequence_lengths
    described = sidecar.read(prefix)
    begin = described.mark_ids.get("fim_begin") if described else None
    chosen = [i * len(corpus) // samples for i in range(min(samples, len(corpus)))] if tokenizer else []
    return Summary(
        documents=len(corpus.document_indices) - 1,
        tokens=int(lengths.sum(dtype=np.int64)),
        dtype=np.dtype(corpus.index.dtype).name,
        lengths=_quantiles(lengths),
        histogram=_histogram(lengths),
        sidecar=described,
        samples=tuple(_sample(corpus[i], i, begin, tokenizer) for i in chosen if tokenizer),
    )


def _quantiles(lengths: NDArray[np.int32]) -> dict[str, int]:
    # Of the lengths themselves: a quantile is one that occurs.
    found = np.quantile(lengths, QUANTILES, method="lower")
    return {f"{share:.0%}": int(value) for share, value in zip(QUANTILES, found, strict=True)}


def _histogram(lengths: NDArray[np.int32]) -> tuple[tuple[int, int], ...]:
    powers = np.bincount(np.frexp(np.maximum(lengths, 1))[1] - 1)
    return tuple((2**power, int(count)) for power, count in enumerate(powers) if count)


def _sample(
    tokens: NDArray[Any], document: int, begin: int | None, tokenizer: TokenizerFile
) -> dict[str, Any]:
    return {
        "document": document,
        "tokens": len(tokens),
        "fim": begin is not None and int(tokens[0]) == begin,
        "text": tokenizer.decode(tokens[:SHOWN].tolist()),
    }


__all__ = ["Summary", "look"]
