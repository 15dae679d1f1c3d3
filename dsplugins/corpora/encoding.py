"""A task's documents as tokens: the part of a build that several processes share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dsplugins.corpora.documents import Bad, Document, documents
from dsplugins.corpora.fim import cuts
from dsplugins.corpora.memory import refuse_unfit
from dsplugins.corpora.sources import Piece
from dsplugins.corpora.tokenizer import TokenizerFile

WIDE = 65500
"""Vocabularies below this are written in 16 bits, as megatron-core's `DType.optimal_dtype` has it."""


type Ids = NDArray[np.uint32]


class Unencodable(ValueError):
    """A tokenizer failed on a document."""


@dataclass(frozen=True)
class Encoder:
    """How documents become tokens; sent to each process once."""

    tokenizer: TokenizerFile
    key: str
    fim_rate: float
    seed: int

    def __call__(self, task: Sequence[Piece]) -> Encoded:
        """All documents of a task, in order. Raises EnvironmentUnfit for one that memory can't hold."""
        bad: list[Bad] = []
        good: list[Document] = []
        for piece in task:
            for found in documents(piece, self.key):
                if isinstance(found, Bad):
                    bad.append(found)
                else:
                    refuse_unfit(piece.place, found.size)
                    good.append(found)
        parts = [self._parts(document) for document in good]
        ids = self._ids(good, parts)
        whole = [self._joined([next(ids) for _ in pieces]) for pieces in parts]
        dtype = np.uint16 if self.tokenizer.vocab_size < WIDE else np.int32
        tokens = np.concatenate([np.empty(0, dtype), *whole], dtype=dtype, casting="unsafe")
        return Encoded(
            tokens=tokens,
            lengths=np.array([len(document) for document in whole], dtype=np.int64),
            sizes=np.array([document.size for document in good], dtype=np.int64),
            turned=sum(len(pieces) > 1 for pieces in parts),
            read=sum(piece.size for piece in task),
            unknown=_count(tokens, self.tokenizer.unknown),
            bad=bad,
        )

    def _ids(self, good: Sequence[Document], parts: Sequence[tuple[str, ...]]) -> Iterator[Ids]:
        """Of each part of each document. Raises Unencodable for the first document that can't be encoded."""
        try:
            return iter(list(self.tokenizer.encode([text for pieces in parts for text in pieces])))
        except Exception:  # the library raises plain Exception, and does not say for which text
            for document, pieces in zip(good, parts, strict=True):
                try:
                    list(self.tokenizer.encode(pieces))
                except Exception as error:
                    said = f"{document.name}: {self.tokenizer.path} can't encode it: {error}"
                    raise Unencodable(said) from error
            raise

    def _parts(self, document: Document) -> tuple[str, ...]:
        """The text, or prefix, suffix and middle of a document that is turned."""
        text = document.text
        cut = cuts(document.name, len(text), seed=self.seed, rate=self.fim_rate)
        if cut is None:
            return (text,)
        low, high = cut
        return text[:low], text[high:], text[low:high]

    def _joined(self, parts: Sequence[Ids]) -> Ids:
        """Tokens of a document, `eos` included; three parts in prefix-suffix-middle form."""
        if len(parts) == 1:
            return np.concatenate([parts[0], self._mark("eos")])
        prefix, suffix, middle = parts
        begin, hole, end, eos = map(self._mark, ("fim_begin", "fim_hole", "fim_end", "eos"))
        return np.concatenate([begin, prefix, hole, suffix, end, middle, eos])

    def _mark(self, name: str) -> Ids:
        token = self.tokenizer.ids[name]
        assert token is not None, "build refuses a tokenizer without the marks that it needs"
        return np.array([token], np.uint32)


def _count(tokens: NDArray[np.generic], token: int | None) -> int:
    return 0 if token is None else int((tokens == token).sum())


@dataclass(frozen=True)
class Encoded:
    """What a process sends back."""

    tokens: NDArray[np.generic]
    """Of all documents, end to end."""
    lengths: NDArray[np.int64]
    """Tokens of each document."""
    sizes: NDArray[np.int64]
    """Bytes of each document's text."""
    turned: int
    """Documents in fill-in-middle form."""
    read: int
    """Bytes of the input."""
    unknown: int = 0
    """Tokens that stand for what the tokenizer doesn't know."""
    bad: list[Bad] = field(default_factory=list)


__all__ = ["Encoded", "Encoder", "Unencodable"]
