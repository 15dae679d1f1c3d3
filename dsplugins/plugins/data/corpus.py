"""A split of documents as training and validation samples: what `contracts.Data` asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dsplugins.plugins.data.files import Document, Split
from dsplugins.plugins.data.fim import training_tokens
from dsplugins.plugins.data.ngram import cross_entropies
from dsplugins.plugins.data.packing import Order, Stream, Windows
from dsplugins.plugins.data.prompt import held_out_line
from dsplugins.plugins.data.tokens import EOS, VOCAB_SIZE, Tokens, decode, encode, joined

PROMPT_BYTES = 400


class Corpus:
    """Fulfils `contracts.Data` for a split of documents."""

    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        split: Split,
        *,
        seq_length: int,
        seed: int,
        fim_rate: float,
        evaluated: int,
        together: int,
        source: str,
    ) -> None:
        """`evaluated`: validation samples that an evaluation is asked for, `together`: how many all ranks
        take at once; the baselines look at the same ones."""
        self._split, self._seq_length = split, seq_length
        self._evaluated, self._together = evaluated, together
        turned = [training_tokens(document, seed=seed, rate=fim_rate) for document in split.train]
        self._stream = Stream([document.name for document in split.train], turned, seed)
        self._order = Order(self._stream.epoch_tokens // seq_length, seed)
        plain = _plain(split.validation)
        self._windows = Windows(plain, seq_length)
        self.facts: Mapping[str, Any] = {
            "source": source,
            "train_files": len(split.train),
            "train_bytes": sum(len(document.content) for document in split.train),
            "train_tokens": self._stream.epoch_tokens,
            "validation_files": len(split.validation),
            "validation_bytes": sum(len(document.content) for document in split.validation),
            "validation_tokens": len(plain),
            "validation_samples": self._windows.count,
            "digest": split.digest,
        }

    def train(self, index: int) -> torch.Tensor:
        """Training sample `index`, int64 [S + 1]: a cut of the packed stream, shuffled (see `packing`)."""
        start = self._order[index] * self._seq_length
        return _tensor(self._stream.read(start, self._seq_length + 1))

    def validation(self, index: int) -> torch.Tensor:
        """Validation sample `index`, int64 [S + 1]: plain held-out text, never fill-in-middle."""
        return _tensor(self._windows.read(index))

    @property
    def validation_size(self) -> int:
        """Number of validation samples."""
        return self._windows.count

    def baselines(self) -> Mapping[str, float]:
        """Unigram and bigram of bytes, fitted on the training files without fill-in-middle, nats a token.

        Measured on the validation samples 0 .. n-1 that the evaluation looks at: n is the smaller of
        evaluate.sequences and validation_size, less what doesn't fill a micro-batch on every rank.
        Empty when it looks at none.
        """
        count = min(self._evaluated, self.validation_size) // self._together * self._together
        if count == 0:
            return {}
        windows = np.stack([self._windows.read(index) for index in range(count)])
        return cross_entropies(_plain(self._split.train), windows, VOCAB_SIZE)

    def prompt(self) -> tuple[list[int], str] | None:
        """The beginning of a held-out line with what stands before it, and the rest of the line.

        At most three quarters of a sample, so that there is room for an answer.
        """
        context = min(PROMPT_BYTES, self._seq_length * 3 // 4)
        found = held_out_line(self._split.validation, context)
        return None if found is None else (list(found[0]), found[1])

    def decode(self, tokens: Sequence[int]) -> str:
        """Token ids as text; see `tokens.decode`."""
        return decode(tokens)


def _plain(documents: Sequence[Document]) -> Tokens:
    eos = np.array([EOS], np.uint16)
    return joined([piece for document in documents for piece in (encode(document.content), eos)])


def _tensor(tokens: Tokens) -> torch.Tensor:
    return torch.from_numpy(tokens.astype(np.int64))
