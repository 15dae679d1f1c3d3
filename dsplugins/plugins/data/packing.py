"""Documents end to end as one endless stream, cut into samples; attention may look across documents.

DeepSeek-V3 packs documents without a cross-sample mask (section 4.1). Sample i holds the tokens
[i S, i S + S] of the stream, S + 1 of them: its last one is only a target here and the first input
of the next sample. An epoch is every document once, in an order that (seed, epoch) decide; epochs
follow each other without a gap, so a sample may begin in one epoch and end in the next, and every
token is a target exactly once an epoch. `Order` then shuffles the samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsplugins.corpora.draws import keys, shuffled
from dsplugins.plugins.data.tokens import Tokens, joined


class Stream:
    """An endless stream over tokenised documents. Reads are pure: same place, same tokens."""

    def __init__(self, names: Sequence[str], documents: Sequence[Tokens], seed: int) -> None:
        assert len(names) == len(documents) > 0 and all(len(document) for document in documents)
        self._names, self._seed = tuple(names), seed
        self._tokens = joined(documents)
        self._starts = np.cumsum([0] + [len(document) for document in documents])
        self._orders: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one epoch; the same in every epoch."""
        return len(self._tokens)

    def order(self, epoch: int) -> list[int]:
        """Documents by index, as this epoch reads them."""
        return shuffled(self._names, "order", self._seed, epoch)

    def read(self, start: int, length: int) -> Tokens:
        """Tokens [start, start + length) of the stream, through as many epochs as that takes."""
        assert start >= 0 and length > 0
        pieces = []
        while length > 0:
            epoch, place = divmod(start, self.epoch_tokens)
            taken = min(length, self.epoch_tokens - place)
            pieces += self._read_epoch(epoch, place, taken)
            start, length = start + taken, length - taken
        return joined(pieces)

    def _read_epoch(self, epoch: int, place: int, length: int) -> list[Tokens]:
        order, ends = self._order_and_ends(epoch)
        position = int(np.searchsorted(ends, place, side="right"))
        pieces = []
        while length > 0:
            document = order[position]
            remaining = int(ends[position]) - place
            stop = int(self._starts[document + 1])
            piece = self._tokens[stop - remaining : stop][:length]
            pieces.append(piece)
            place, length, position = place + len(piece), length - len(piece), position + 1
        return pieces

    def _order_and_ends(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # Reads go forward, so the last two epochs are all that is worth keeping.
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            order = np.array(self.order(epoch), dtype=np.int64)
            self._orders[epoch] = (order, np.cumsum(np.diff(self._starts)[order]))
        return self._orders[epoch]


class Order:
    """Training samples in an order of their own, so that one step does not read one long file.

    Blocks of about an epoch of samples are shuffled one by one; (seed, block) decide each order. Every
    sample of the stream comes exactly once.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self._samples, self._seed = max(samples, 1), seed
        self._blocks: dict[int, list[int]] = {}

    def __getitem__(self, index: int) -> int:
        """Which sample of the stream is the `index`-th one trained on."""
        block, place = divmod(index, self._samples)
        if block not in self._blocks:
            # Reads go forward; a step may straddle two blocks.
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            drawn = keys("sample", self._seed, block, last=range(self._samples))
            self._blocks[block] = sorted(range(self._samples), key=drawn.__getitem__)
        return block * self._samples + self._blocks[block][place]


class Windows:
    """Held-out text in windows of S + 1 tokens that overlap by one; the incomplete last one is left out.

    The windows come in a fixed order that strides through the whole text, so that the first few
    already speak for all of it; consecutive ones would often show a single file.
    """

    def __init__(self, tokens: Tokens, seq_length: int) -> None:
        self._tokens, self._length = tokens, seq_length
        self.count = max(0, (len(tokens) - 1) // seq_length)
        self._stride = _golden_stride(self.count)

    def read(self, index: int) -> Tokens:
        """Window `index` < `count`, uint16 [S + 1]; IndexError beyond."""
        if not 0 <= index < self.count:
            raise IndexError(f"validation sample {index} of {self.count}")
        start = index * self._stride % self.count * self._length
        return self._tokens[start : start + self._length + 1]


def _golden_stride(count: int) -> int:
    # Multiples of the golden section fill a circle evenly at every length; coprime means each window once.
    stride = max(1, round(count * 0.6180339887498949))
    while np.gcd(stride, max(1, count)) != 1:
        stride += 1
    return stride
