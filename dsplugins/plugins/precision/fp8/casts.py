"""The Triton casts as the first half of an `Arithmetic`. Imported from hook bodies only: it needs triton."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton

from dsplugins.numerics.tiles import E4M3, ROW, SMALLEST_AMAX, SQUARE, TILE, Quantised
from dsplugins.plugins.precision.fp8 import kernels
from dsplugins.plugins.precision.fp8.columns import Columns, tiles, whole
from dsplugins.plugins.precision.fp8.e5m6 import Packed

TOKENS = 32
"""Tiles of 1 x 128 that one program of a row kernel makes."""
CHANNELS = 64
"""Channels of 128 tokens that one program of the column kernel makes."""


class TritonCasts:
    """All of `arithmetic.Arithmetic` but its products, on CUDA.

    Scales of rows lie as Hopper's products want them, [K / 128, T] seen as [T, K / 128].
    """

    def rows(self, x: torch.Tensor, power_of_two: bool, smallest: float = SMALLEST_AMAX) -> Quantised:
        """[T, K] in tiles of 1 x 128."""
        x = x.contiguous()
        codes, scales = _row_outputs(x.shape[0], x.shape[1], x.device)
        grid = (triton.cdiv(x.shape[0], TOKENS), scales.shape[0])
        if x.numel():
            kernels.rows_kernel[grid](x, codes, scales, *x.shape, _bits(smallest), power_of_two, TOKENS)
        return Quantised(codes, scales.t(), ROW)

    def swiglu_rows(self, inner: torch.Tensor, probs: torch.Tensor | None, power_of_two: bool) -> Quantised:
        """SwiGLU and `rows` in one kernel; probs [T] must be contiguous."""
        inner, (tokens, width) = inner.contiguous(), (inner.shape[0], inner.shape[1] // 2)
        codes, scales = _row_outputs(tokens, width, inner.device)
        grid = (triton.cdiv(tokens, TOKENS), scales.shape[0])
        if inner.numel():
            given = inner if probs is None else probs.contiguous()
            kernels.swiglu_rows_kernel[grid](
                inner, given, codes, scales, tokens, width, _bits(SMALLEST_AMAX),
                probs is not None, power_of_two, TOKENS,
            )  # fmt: skip
        return Quantised(codes, scales.t(), ROW)

    def columns(
        self,
        x: torch.Tensor | Quantised,
        splits: Sequence[int],
        power_of_two: bool,
        smallest: float = SMALLEST_AMAX,
    ) -> Columns:
        """Each run transposed, [K, t], in tiles of 1 x 128."""
        values = (x.codes if isinstance(x, Quantised) else x).contiguous()
        scales_in = x.scales if isinstance(x, Quantised) else values.new_empty(0, 0, dtype=torch.float32)
        channels, device = values.shape[1], values.device
        table = torch.tensor(tiles(splits, channels), dtype=torch.int64).view(-1, 4)
        codes = torch.empty(sum(map(whole, splits)) * channels, dtype=E4M3, device=device)
        scales = torch.empty(len(table), channels, device=device)
        if len(table):
            kernels.columns_kernel[(len(table), triton.cdiv(channels, CHANNELS))](
                values, scales_in, codes, scales, table.to(device, non_blocking=True), channels,
                *scales_in.stride(), _bits(smallest), isinstance(x, Quantised), power_of_two, CHANNELS,
            )  # fmt: skip
        return Columns(codes, scales, splits)

    def blocks(self, weight: torch.Tensor, power_of_two: bool, transposed: bool = False) -> Quantised:
        """[E, N, K] in tiles of 128 x 128."""
        weight = weight.contiguous()
        experts, rows, columns = weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        codes = torch.empty(experts, *shape, dtype=E4M3, device=weight.device)
        down, across = (triton.cdiv(size, TILE) for size in shape)
        scales = torch.empty(experts, down, across, device=weight.device)
        grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE), experts)
        kernels.blocks_kernel[grid](
            weight, codes, scales, rows, columns, down, across, _bits(SMALLEST_AMAX),
            power_of_two, transposed, num_warps=8,
        )  # fmt: skip
        return Quantised(codes, scales, SQUARE)

    def pack(self, x: torch.Tensor) -> Packed:
        """[T, K] in E5M6, two numbers in three bytes."""
        x, (tokens, channels) = x.contiguous(), x.shape
        packed = torch.empty(tokens, 3 * -(-channels // 2), dtype=torch.uint8, device=x.device)
        scales = torch.empty(triton.cdiv(channels, TILE), tokens, device=x.device)
        if x.numel():
            kernels.e5m6_pack_kernel[(triton.cdiv(tokens, TOKENS), scales.shape[0])](
                x, packed, scales, tokens, channels, _bits(SMALLEST_AMAX), TOKENS
            )
        return Packed(packed, scales.t(), channels)

    def unpack(self, packed: Packed) -> torch.Tensor:
        """BF16 [T, K]."""
        source, tokens = packed.bytes.contiguous(), packed.bytes.shape[0]
        y = torch.empty(tokens, packed.columns, dtype=torch.bfloat16, device=source.device)
        if y.numel():
            kernels.e5m6_unpack_kernel[(triton.cdiv(tokens, TOKENS), packed.scales.shape[1])](
                source, packed.scales, y, tokens, packed.columns, *packed.scales.stride(), TOKENS
            )
        return y


def _row_outputs(tokens: int, channels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, K], and scales [ceil(K / 128), T]."""
    codes = torch.empty(tokens, channels, dtype=E4M3, device=device)
    return codes, torch.empty(triton.cdiv(channels, TILE), tokens, device=device)


def _bits(number: float) -> int:
    """The bits of a float32 as an integer."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])
