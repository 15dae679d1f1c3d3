"""Which corpus the next sample comes from: megatron-core's greedy blending, as a pattern that repeats."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsplugins.plugins.data.indexed_rare import Rare, rare

PERIOD = 1 << 20
"""Samples after which the pattern begins again: shares are met to a millionth, rare corpora apart."""


class Mixture:
    """An endless sequence of (corpus, its n-th sample), or an empty one of no corpora.

    A place in it doesn't depend on a run's length.

    Core's `build_blending_indices` takes from the corpus that lies furthest behind its share. What a period
    gives of a small share is a whole number, and may be far from it: from the second period on such corpora
    are `rare`, and dealt exactly.
    """

    def __init__(self, weights: Sequence[float], period: int = PERIOD) -> None:
        size = period if len(weights) > 1 else len(weights)
        self.corpus, self.nth = blend(weights, size)
        self._each = np.bincount(self.corpus, minlength=len(weights))
        """Samples of each corpus in a period."""
        self._rare: Rare | None = rare(weights, self.corpus)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(corpus, which of its samples) of sample `index`, any from 0 on."""
        period, place = divmod(index, len(self.corpus))
        if period and self._rare:
            corpus, nth = self._rare[index - len(self.corpus)]
            return corpus, int(self._each[corpus]) + nth
        corpus = int(self.corpus[place])
        return corpus, period * int(self._each[corpus]) + int(self.nth[place])

    def taken(self, total: int) -> NDArray[np.int64]:
        """Samples of each corpus among the first `total`."""
        periods, rest = divmod(total, max(1, len(self.corpus)))
        if periods and self._rare:
            return self._each + self._rare.taken(total - len(self.corpus))
        return periods * self._each + np.bincount(self.corpus[:rest], minlength=len(self._each))

    def until(self, samples: Sequence[int]) -> int:
        """How many samples there are until a corpus would give more than its `samples`."""
        limits = np.asarray(samples)
        totals = range(1, int(limits.sum()) + 1)
        return bisect_left(totals, True, key=lambda total: bool((self.taken(total) > limits).any()))


def blend(weights: Sequence[float], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """(corpus, which of its samples) of the first `size` samples, in shares of `weights` > 0."""
    from megatron.core.datasets import helpers
    from megatron.core.datasets.utils import normalize

    corpus, nth = np.zeros(size, np.int16), np.zeros(size, np.int64)
    if size:  # core's code writes to the first corpus even where there is none
        helpers.build_blending_indices(corpus, nth, normalize(list(weights)), len(weights), size, False)
    return corpus, nth


__all__ = ["Mixture", "blend"]
