"""Runs of tokens, transposed and quantised along the tokens, in one piece of memory.

The layout serves grouped products as well as single ones: each run is filled up to whole tiles with zeros,
which no sum notices. Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import overload

import torch

from dsplugins.numerics.tiles import ROW, TILE, Quantised


@dataclass(frozen=True)
class Columns(Sequence[Quantised]):
    """As a sequence: of each run the [K, t] matrix, without what fills it up."""

    codes: torch.Tensor
    """float8_e4m3fn [K * P], one [K, p] matrix after the other; p is t rounded up to 128, P their sum."""
    scales: torch.Tensor
    """float32 [P / 128, K]: a row for each tile, one run after the other."""
    splits: Sequence[int]
    """t of each run."""

    @cached_property
    def lengths(self) -> list[int]:
        """p of each run."""
        return [whole(run) for run in self.splits]

    @cached_property
    def starts(self) -> list[int]:
        """The first token of each run, of P."""
        return [0, *accumulate(self.lengths)]

    @property
    def channels(self) -> int:
        """K."""
        return self.scales.shape[1]

    def filled(self, run: int) -> Quantised:
        """A run as it lies there: codes [K, p] contiguous, scales [K, p / 128] one column after the other."""
        start, length, channels = self.starts[run], self.lengths[run], self.channels
        codes = self.codes[start * channels : (start + length) * channels].view(channels, length)
        return Quantised(codes, self.scales[start // TILE : (start + length) // TILE].t(), ROW)

    @overload
    def __getitem__(self, run: int) -> Quantised: ...
    @overload
    def __getitem__(self, run: slice) -> list[Quantised]: ...
    def __getitem__(self, run: int | slice) -> Quantised | list[Quantised]:
        """The matrix of a run."""
        if isinstance(run, slice):
            return [self[one] for one in range(*run.indices(len(self)))]
        if not 0 <= run < len(self):
            raise IndexError(run)
        filled = self.filled(run)
        return Quantised(filled.codes[:, : self.splits[run]], filled.scales, ROW)

    def __len__(self) -> int:
        """E, the number of runs."""
        return len(self.splits)


def whole(tokens: int) -> int:
    """`tokens` rounded up to whole tiles."""
    return -(-tokens // TILE) * TILE


def tiles(splits: Sequence[int], channels: int) -> list[tuple[int, int, int, int]]:
    """Of each tile: its first token, how many there are, where its codes begin, and the length of its run.

    The codes of its channel k begin k lengths further on.
    """
    found, first, start = [], 0, 0
    for run in splits:
        length = whole(run)
        for offset in range(0, run, TILE):
            found.append((first + offset, min(TILE, run - offset), start * channels + offset, length))
        first, start = first + run, start + length
    return found
