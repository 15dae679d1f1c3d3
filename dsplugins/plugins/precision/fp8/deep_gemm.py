"""Products by DeepGEMM, DeepSeek's own kernels. Imported from hook bodies only.

Version 2.x of `deep_gemm`, on Hopper: `fp8_gemm_nt` for linears and weight gradients,
`m_grouped_fp8_gemm_nt_contiguous` for all experts in one (its README and tests say how operands lie).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch

from dsplugins.numerics.tiles import E4M3, Quantised
from dsplugins.plugins.precision.fp8.casts import TritonCasts
from dsplugins.plugins.precision.fp8.columns import Columns, whole

NOBODYS = -1
"""In the place of an expert's number: a row that is there to fill up."""
BOTH_IN_ROWS = (1, 1, 128)
"""Both operands have a scale for 128 numbers of a row; such a product is added to FP32 (its gemm.hpp)."""


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
        place, layout = _filled_up(tuple(splits), x.codes.device)
        filled = _scattered(x, place, len(layout))
        y = torch.empty(len(layout), weights.codes.shape[1], dtype=dtype, device=x.codes.device)
        self._kernels.m_grouped_fp8_gemm_nt_contiguous(
            (filled.codes, filled.scales), (weights.codes, weights.scales), y, layout
        )
        return y[place]

    def weight_gradient(self, dy: Sequence[Quantised], x: Sequence[Quantised], into: torch.Tensor) -> None:
        """One expert after the other, by the dense kernel for two operands with scales in rows.

        Not by `k_grouped_fp8_gemm_nt_contiguous`, which does all in one: while it goes from one expert to the
        next it may read the last one's numbers (DeepGEMM issues 365 and 430: wrong now and then, for experts
        of exactly 128 tokens).
        """
        assert isinstance(dy, Columns) and isinstance(x, Columns), "made by this class's `columns`"
        for expert, length in enumerate(x.lengths):
            if length:
                left, right = dy.filled(expert), x.filled(expert)
                self._kernels.fp8_gemm_nt(
                    (left.codes, left.scales), (right.codes, right.scales), into[expert], c=into[expert],
                    recipe=BOTH_IN_ROWS, compiled_dims="mn",
                )  # fmt: skip


@lru_cache(maxsize=16)
def _filled_up(splits: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
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
