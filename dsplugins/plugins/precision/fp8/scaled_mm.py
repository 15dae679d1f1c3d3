"""Products by `torch.nn.functional.scaled_mm`: cuBLASLt's block scaling, which Hopper has from version 12.9.

Experts take turns: torch 2.14 has no grouped product with these tiles. Imported from hook bodies only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import ScalingType, pad, scaled_mm

from dsplugins.numerics.tiles import ROW, Quantised
from dsplugins.plugins.precision.fp8.casts import TritonCasts
from dsplugins.plugins.precision.fp8.columns import Columns

FOURS = 4
"""cuBLASLt reads the scales of 128 x 128 tiles in columns of a multiple of four."""


class ScaledMm(TritonCasts):
    """See `arithmetic.Arithmetic`. On Hopper; widths must be multiples of 16."""

    def product(
        self, x: Quantised, weights: Quantised, splits: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """One expert after the other, into one tensor."""
        scales = pad(weights.scales, (0, -weights.scales.shape[2] % FOURS))
        if len(splits) == 1 and splits[0]:
            return _square(x, weights.codes[0], scales[0].t(), dtype)
        y = torch.empty(x.codes.shape[0], weights.codes.shape[1], dtype=dtype, device=x.codes.device)
        runs = zip(y.split(list(splits)), x.split(splits), weights.codes, scales, strict=True)
        for out, part, codes, fours in runs:
            if out.numel():
                out.copy_(_square(part, codes, fours.t(), dtype))
        return y

    def weight_gradient(self, dy: Sequence[Quantised], x: Sequence[Quantised]) -> torch.Tensor:
        """One expert after the other; zeros for one without tokens."""
        assert isinstance(dy, Columns) and isinstance(x, Columns), "made by this class's `columns`"
        dw = torch.zeros(len(dy), dy.channels, x.channels, device=x.codes.device)
        for expert, length in enumerate(x.lengths):
            if length:
                dw[expert] = _both_in_rows(dy.filled(expert), x.filled(expert))
        return dw


def _square(x: Quantised, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [M, K] times codes [N, K] transposed, whose tiles are 128 x 128: [M, N]."""
    return scaled_mm(
        x.codes, codes.t(), _by_column(x.scales), ScalingType.BlockWise1x128,
        scales, ScalingType.BlockWise128x128, output_dtype=dtype,
    )  # fmt: skip


def _both_in_rows(a: Quantised, b: Quantised) -> torch.Tensor:
    """a [M, K] times b [N, K] transposed, both in tiles of 1 x 128: FP32 [M, N]."""
    assert a.tile == b.tile == ROW
    return scaled_mm(
        a.codes, b.codes.t(), _by_column(a.scales), ScalingType.BlockWise1x128,
        _by_column(b.scales), ScalingType.BlockWise1x128, output_dtype=torch.float32,
    )  # fmt: skip


def _by_column(scales: torch.Tensor) -> torch.Tensor:
    """[M, tiles] that lies one tile after the other; a copy where it is part of something longer."""
    return scales.t().contiguous().t()
