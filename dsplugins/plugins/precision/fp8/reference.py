"""Casts and products in plain torch: the meaning that every other implementation is held to.

Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsplugins.numerics.tiles import ROW, SMALLEST_AMAX, SQUARE, TILE, Quantised, dequantise, quantise
from dsplugins.plugins.precision.fp8 import e5m6, swiglu


class Reference:
    """See `arithmetic.Arithmetic`. On CPU and CUDA; products are FP32 products of the codes."""

    def rows(self, x: torch.Tensor, power_of_two: bool, smallest: float = SMALLEST_AMAX) -> Quantised:
        """[T, K] in tiles of 1 x 128."""
        return quantise(x, ROW, power_of_two, smallest)

    def columns(
        self,
        x: torch.Tensor | Quantised,
        splits: Sequence[int],
        power_of_two: bool,
        smallest: float = SMALLEST_AMAX,
    ) -> Sequence[Quantised]:
        """Each run transposed, [K, t], in tiles of 1 x 128."""
        numbers = dequantise(x) if isinstance(x, Quantised) else x
        return [quantise(run.t(), ROW, power_of_two, smallest) for run in numbers.split(list(splits))]

    def blocks(self, weight: torch.Tensor, power_of_two: bool, transposed: bool = False) -> Quantised:
        """Each [N, K] in tiles of 128 x 128, which serve both directions."""
        each = [quantise(one, SQUARE, power_of_two) for one in weight.unbind()]
        whole = Quantised(torch.stack([q.codes for q in each]), torch.stack([q.scales for q in each]), SQUARE)
        return whole.t if transposed else whole

    def swiglu_rows(self, inner: torch.Tensor, probs: torch.Tensor | None, power_of_two: bool) -> Quantised:
        """SwiGLU, then `rows`."""
        return self.rows(swiglu.forward(inner, probs).to(inner.dtype), power_of_two)

    def swiglu_columns(
        self, kept: swiglu.SwigluKept, splits: Sequence[int], power_of_two: bool
    ) -> Sequence[Quantised]:
        """SwiGLU, then `columns`."""
        return self.columns(kept.active(), splits, power_of_two)

    def swiglu_gradient(
        self, kept: swiglu.SwigluKept, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `swiglu.backward`."""
        return swiglu.backward(kept, dy)

    def pack(self, x: torch.Tensor) -> e5m6.Packed:
        """[T, K] in E5M6."""
        return e5m6.pack(x)

    def unpack(self, packed: e5m6.Packed) -> torch.Tensor:
        """BF16 [T, K]."""
        return e5m6.unpack(packed).bfloat16()

    def product(
        self, x: Quantised, weights: Quantised, splits: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """One expert after the other."""
        parts = zip(x.split(splits), weights.unbind(), strict=True)
        return torch.cat([product(part, weight) for part, weight in parts]).to(dtype)

    def weight_gradient(self, dy: Sequence[Quantised], x: Sequence[Quantised], into: torch.Tensor) -> None:
        """One expert after the other."""
        for sums, left, right in zip(into, dy, x, strict=True):
            sums += product(left, right)


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
