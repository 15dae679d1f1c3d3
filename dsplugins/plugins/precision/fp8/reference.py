"""Products of quantised matrices in plain torch: the meaning that every other backend is held to.

Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

import torch

from dsplugins.numerics.tiles import TILE, Quantised


def product(a: Quantised, b: Quantised) -> torch.Tensor:
    """a [M, K] times b [N, K] transposed: float32 [M, N].

    K is cut into runs of 128. Each run's products are summed in FP32, multiplied by the scales of both tiles,
    and added up in FP32: the promotion that the report makes every 128 elements (3.3.2). A row of either side
    may have scales of its own (tiles 1 x 128) or share them (128 x 128).
    """
    assert a.tile[1] == b.tile[1] == TILE, (
        "the tiles of both sides must be 128 long in the direction of the sum"
    )
    total = torch.zeros(a.codes.shape[0], b.codes.shape[0], device=a.codes.device)
    left, right = _by_row(a), _by_row(b)
    for run, start in enumerate(range(0, a.codes.shape[1], TILE)):
        part = a.codes[:, start : start + TILE].float() @ b.codes[:, start : start + TILE].float().t()
        total.addcmul_(part.mul_(left[:, run, None]), right[None, :, run])
    return total


def _by_row(q: Quantised) -> torch.Tensor:
    """A scale for each row and run: [M, ceil(K / 128)]."""
    if q.tile[0] == 1:
        return q.scales
    return q.scales.repeat_interleave(q.tile[0], 0)[: q.codes.shape[0]]
