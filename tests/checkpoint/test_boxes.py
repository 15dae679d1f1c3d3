"""A flat range is covered by boxes, in order, each element once."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from dsplugins.checkpoint.boxes import boxes


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_cover_a_range_in_order(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = torch.arange(size).view(shape)
    found = []
    cut = list(boxes(shape, start, stop))
    for offsets, sizes in cut:
        box = whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        assert box.shape == sizes
        found += box.flatten().tolist()
    assert found == list(range(start, stop))
    assert len(cut) <= 2 * len(shape) - 1
