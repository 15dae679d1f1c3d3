"""A flat range of a tensor as rectangular boxes: what a rank's share of optimizer state looks like.

ZeRO gives each rank elements [start, stop) of a flattened parameter, cut without regard for rows. A
checkpoint that other layouts can read stores rectangles; a range is at most 2 n - 1 of them in n dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Offsets = tuple[int, ...]
Sizes = tuple[int, ...]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[Offsets, Sizes]]:
    """(offsets, sizes) of boxes that cover elements [start, stop) of `shape` in order, each exactly once."""
    assert shape and start >= 0 and stop <= math.prod(shape)
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, end = -(-start // row), stop // row  # whole rows
    if first > end:
        yield from _within(shape, end, start - end * row, stop - end * row)
        return
    if start % row:
        yield from _within(shape, first - 1, start % row, row)
    if first < end:
        yield (first, *(0 for _ in shape[1:])), (end - first, *shape[1:])
    if stop % row:
        yield from _within(shape, end, 0, stop % row)


def _within(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[tuple[Offsets, Sizes]]:
    """Boxes of elements [start, stop) of row `index`."""
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (index, *offsets), (1, *sizes)


__all__ = ["boxes"]
