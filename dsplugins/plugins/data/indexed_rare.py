"""Corpora whose share a pattern can't give, as it gives whole samples: dealt over many patterns.

A rare corpus has slots in the pattern, at least as many as its share asks for. Of the first m it gets m * r,
rounded down, and the largest corpus gets the others: a closed form, to the sample at any ratio.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

CLOSE = Fraction(1, 10)
"""A pattern gives a corpus its share where it is off by no more than this part of it."""


@dataclass(frozen=True)
class Slots:
    """Of one rare corpus."""

    places: list[int]
    """In the pattern, sorted."""
    kept: Fraction
    """Part of the slots that is its own, below 1."""

    def before(self, patterns: int, place: int) -> int:
        """Slots before a place of a pattern."""
        return patterns * len(self.places) + bisect_left(self.places, place)

    def own(self, slots: int) -> int:
        """Samples of this corpus among the first `slots`."""
        return slots * self.kept.numerator // self.kept.denominator


class Rare:
    """An endless sequence of (corpus, its n-th sample): a pattern again and again, but for its slots."""

    def __init__(self, pattern: NDArray[np.int16], slots: Mapping[int, Slots], largest: int) -> None:
        self._slots, self._largest = slots, largest
        self._corpus = pattern.copy()
        for corpus, its in slots.items():
            self._corpus[its.places] = corpus
        self._each = np.bincount(self._corpus, minlength=int(pattern.max()) + 1)
        self._before = np.zeros(len(pattern), np.int64)
        """Samples of a place's corpus before it; of the largest one's at a slot."""
        for corpus, count in enumerate(self._each):
            self._before[self._corpus == corpus] = np.arange(count)
        larger = np.flatnonzero(self._corpus == largest)
        for its in slots.values():
            self._before[its.places] = np.searchsorted(larger, its.places)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(corpus, which of its samples) of sample `index`, any from 0 on."""
        patterns, place = divmod(index, len(self._corpus))
        corpus = int(self._corpus[place])
        if its := self._slots.get(corpus):
            slot = its.before(patterns, place)
            if its.own(slot + 1) > its.own(slot):
                return corpus, its.own(slot)
            corpus = self._largest
        nth = patterns * int(self._each[corpus]) + int(self._before[place])
        if corpus == self._largest:
            for its in self._slots.values():
                slots = its.before(patterns, place)
                nth += slots - its.own(slots)
        return corpus, nth

    def taken(self, total: int) -> NDArray[np.int64]:
        """Samples of each corpus among the first `total`."""
        patterns, rest = divmod(total, len(self._corpus))
        counts = patterns * self._each + np.bincount(self._corpus[:rest], minlength=len(self._each))
        for corpus, its in self._slots.items():
            left = int(counts[corpus]) - its.own(int(counts[corpus]))
            counts[corpus] -= left
            counts[self._largest] += left
        return counts


def rare(weights: Sequence[float], pattern: NDArray[np.int16]) -> Rare | None:
    """What goes on after a first pattern; None where that gives every corpus its share."""
    total = sum(map(Fraction, weights))
    asked = [Fraction(weight) * len(pattern) / total for weight in weights]
    given = np.bincount(pattern, minlength=len(weights)).tolist()
    found = [corpus for corpus, share in enumerate(asked) if abs(given[corpus] - share) > CLOSE * share]
    if not found:
        return None
    largest = max(range(len(weights)), key=lambda corpus: asked[corpus])
    more = {corpus: max(0, int(asked[corpus]) + 1 - given[corpus]) for corpus in found}
    lent = _spread(np.flatnonzero(pattern == largest), more)
    slots = {}
    for corpus in found:
        places = sorted([*np.flatnonzero(pattern == corpus).tolist(), *lent[corpus]])
        slots[corpus] = Slots(places, asked[corpus] / len(places))
    return Rare(pattern, slots, largest)


def _spread(places: NDArray[np.intp], counts: Mapping[int, int]) -> dict[int, list[int]]:
    """So many of the places for each, in turn and far apart."""
    turns = sorted((turn, corpus) for corpus, count in counts.items() for turn in range(count))
    assert len(turns) < len(places), "the largest corpus has a share above that of all rare ones"
    spread: dict[int, list[int]] = {corpus: [] for corpus in counts}
    for number, (_, corpus) in enumerate(turns):
        spread[corpus].append(int(places[number * len(places) // len(turns)]))
    return spread


__all__ = ["Rare", "rare"]
