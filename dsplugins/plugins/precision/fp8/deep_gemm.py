"""Products by DeepGEMM, DeepSeek's own kernels. Imported from hook bodies only.

Version 2.x of `deep_gemm`, on Hopper: `fp8_gemm_nt` for linears and weight gradients,
`m_grouped_fp8_gemm_nt_contiguous` for all experts in one (its README and tests say how operands lie).
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
from dsplugins.plugins.precision.fp8.host_tables import on_device

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
        source, layout, place = _filled_up(tuple(splits), device=x.codes.device)
        filled = x if place is None else _taken(x, source)
        y = torch.empty(len(layout), weights.codes.shape[1], dtype=dtype, device=x.codes.device)
        self._kernels.m_grouped_fp8_gemm_nt_contiguous(
            (filled.codes, filled.scales), (weights.codes, weights.scales), y, layout
        )
        return y if place is None else y.index_select(0, place)

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


@on_device
def _filled_up(splits: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """When runs are filled up to P rows of whole tiles, in int32: which token lies in each row, [P] (the
    first one where there is none); whose it is, [P]; the row of each token, [T], None where nothing is to
    fill.
    """
    lengths = [whole(run) for run in splits]
    starts = [0, *accumulate(lengths)]
    place = torch.cat([torch.arange(start, start + run) for start, run in zip(starts, splits, strict=False)])
    source = torch.zeros(starts[-1], dtype=torch.int32)
    source[place] = torch.arange(len(place), dtype=torch.int32)
    layout = torch.full((starts[-1],), NOBODYS, dtype=torch.int32)
    layout[place] = torch.repeat_interleave(torch.arange(len(splits)), torch.tensor(splits)).int()
    return source, layout, None if list(splits) == lengths else place.int()


def _taken(x: Quantised, source: torch.Tensor) -> Quantised:
    """Rows `source` of x, with scales as the kernels want them."""
    codes = x.codes.view(torch.uint8).index_select(0, source).view(E4M3)
    return Quantised(codes, x.scales.t().index_select(1, source).t(), x.tile)
