"""Products by `torch.nn.functional.scaled_mm`: cuBLASLt's block scaling, which Hopper has from version 12.9.

Experts take turns: torch 2.14 has no grouped product with these tiles. Imported from hook bodies only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import ScalingType, pad, scaled_mm

from dsplugins.numerics.tiles import E4M3, ROW, Quantised
from dsplugins.plugins.precision.fp8.casts import TritonCasts
from dsplugins.plugins.precision.fp8.columns import Columns

FOURS = 4
"""cuBLASLt reads the scales of 128 x 128 tiles in columns of a multiple of four."""
TOKENS = 16
"""A product has a multiple of so many rows: cuBLASLt wants 8 where each has scales of its own
(TransformerEngine, cublaslt_gemm.cu)."""


class ScaledMm(TritonCasts):
    """See `arithmetic.Arithmetic`. On Hopper; widths must be multiples of 16."""

    def product(
        self, x: Quantised, weights: Quantised, splits: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """One expert after the other, into one tensor."""
        scales = pad(weights.scales, (0, -weights.scales.shape[2] % FOURS))
        runs = zip(x.split(splits), weights.codes, scales, strict=True)
        parts = [_square(run, codes, fours.t(), dtype) for run, codes, fours in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def weight_gradient(self, dy: Sequence[Quantised], x: Sequence[Quantised], into: torch.Tensor) -> None:
        """One expert after the other; nothing for one without tokens."""
        assert isinstance(dy, Columns) and isinstance(x, Columns), "made by this class's `columns`"
        for expert, length in enumerate(x.lengths):
            if length:
                into[expert] += _both_in_rows(dy.filled(expert), x.filled(expert))


def _square(x: Quantised, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [M, K] times codes [N, K] transposed, whose tiles are 128 x 128: [M, N]."""
    rows = x.codes.shape[0]
    if not rows:
        return torch.empty(0, codes.shape[0], dtype=dtype, device=codes.device)
    x = _filled_up(x)
    y = scaled_mm(
        x.codes, codes.t(), _by_column(x.scales), ScalingType.BlockWise1x128,
        scales, ScalingType.BlockWise128x128, output_dtype=dtype,
    )  # fmt: skip
    return y[:rows]


def _filled_up(x: Quantised) -> Quantised:
    """With rows of zeros, up to a multiple of `TOKENS`."""
    more = -x.codes.shape[0] % TOKENS
    if not more:
        return x
    codes = pad(x.codes.view(torch.uint8), (0, 0, 0, more)).view(E4M3)
    return Quantised(codes, pad(x.scales, (0, 0, 0, more), value=1.0), x.tile)


def _both_in_rows(a: Quantised, b: Quantised) -> torch.Tensor:
    """a [M, K] times b [N, K] transposed, both in tiles of 1 x 128: FP32 [M, N]."""
    assert a.tile == b.tile == ROW
    return scaled_mm(
        a.codes, b.codes.t(), _by_column(a.scales), ScalingType.BlockWise1x128,
        _by_column(b.scales), ScalingType.BlockWise1x128, output_dtype=torch.float32,
    )  # fmt: skip


def _by_column(scales: torch.Tensor) -> torch.Tensor:
    """[M, tiles] that lies one tile after the other; a copy where it is part of something longer.

    With one tile, too: there `contiguous` would take any distance between tiles for right.
    """
    rows, tiles = scales.shape
    if scales.stride() == (1, rows):
        return scales
    return scales.new_empty(tiles, rows).copy_(scales.t()).t()
