"""Products by DeepGEMM, DeepSeek's own kernels, all experts in one. Imported from hook bodies only.

Version 2.x of `deep_gemm`, on Hopper: `fp8_gemm_nt` for linears, `m_grouped_fp8_gemm_nt_contiguous` for
experts, `k_grouped_fp8_gemm_nt_contiguous` for weight gradients (its README and tests say how operands lie).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch

from dsplugins.numerics.tiles import E4M3, Quantised
from dsplugins.plugins.precision.fp8.casts import TritonCasts
from dsplugins.plugins.precision.fp8.columns import Columns, whole

NOBODYS = -1
"""In the place of an expert's number: a row that is there to fill up."""


class DeepGemm(TritonCasts):
    """See `arithmetic.Arithmetic`. On Hopper, outputs in BF16; widths must be multiples of 16."""

    def __init__(self) -> None:
        self._kernels: Any = import_module("deep_gemm")

    def product(
        self, x: Quantised, weights: Quantised, splits: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Experts' runs are filled up to 128 rows each, and taken out again."""
        assert dtype == torch.bfloat16, "fp8_v3 refuses other formats with deepgemm"
        if len(splits) == 1:
            y = torch.empty(splits[0], weights.codes.shape[1], dtype=dtype, device=x.codes.device)
            only = weights.unbind()[0]
            self._kernels.fp8_gemm_nt((x.codes, x.scales), (only.codes, only.scales), y)
            return y
        place, layout = _filled_up(splits, x.codes.device)
        filled = _scattered(x, place, len(layout))
        y = torch.empty(len(layout), weights.codes.shape[1], dtype=dtype, device=x.codes.device)
        self._kernels.m_grouped_fp8_gemm_nt_contiguous(
            (filled.codes, filled.scales), (weights.codes, weights.scales), y, layout
        )
        return y[place]

    def weight_gradient(self, dy: Sequence[Quantised], x: Sequence[Quantised], into: torch.Tensor) -> None:
        """Sums run along tokens, each expert's own, and begin with what is there.

        Experts without tokens come along: the kernel passes over them, and would be built once more for each
        number of others.
        """
        assert isinstance(dy, Columns) and isinstance(x, Columns), "made by this class's `columns`"
        if not any(x.lengths):
            return
        on_device = torch.tensor(x.lengths, dtype=torch.int32, device=x.codes.device)
        self._kernels.k_grouped_fp8_gemm_nt_contiguous(
            (dy.codes, dy.scales.t()), (x.codes, x.scales.t()), into, x.lengths, on_device, into
        )


def _filled_up(splits: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each token goes when runs are filled up to whole tiles, [T]; whose a row is then, int32 [P]."""
    lengths = [whole(run) for run in splits]
    starts = [0, *accumulate(lengths)]
    place = torch.cat([torch.arange(start, start + run) for start, run in zip(starts, splits, strict=False)])
    layout = torch.full((starts[-1],), NOBODYS, dtype=torch.int32)
    layout[place] = torch.repeat_interleave(torch.arange(len(splits)), torch.tensor(splits)).int()
    return place.to(device, non_blocking=True), layout.to(device, non_blocking=True)


def _scattered(x: Quantised, place: torch.Tensor, rows: int) -> Quantised:
    """x [T, K] with its rows at `place` of [rows, K], and zeros elsewhere."""
    codes = torch.zeros(rows, x.codes.shape[1], dtype=torch.uint8, device=place.device)
    codes[place] = x.codes.view(torch.uint8)
    scales = torch.ones(x.scales.shape[1], rows, device=place.device)
    scales[:, place] = x.scales.t()
    return Quantised(codes.view(E4M3), scales.t(), x.tile)
