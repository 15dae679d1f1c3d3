"""The Triton casts as the first half of an `Arithmetic`. Imported from hook bodies only: it needs triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from dsplugins.numerics.tiles import E4M3, ROW, SMALLEST_AMAX, SQUARE, TILE, Quantised, bits_of
from dsplugins.plugins.precision.fp8 import e5m6_kernels, kernels, swiglu, swiglu_kernels
from dsplugins.plugins.precision.fp8.columns import Columns, tiles, whole
from dsplugins.plugins.precision.fp8.e5m6 import Packed
from dsplugins.plugins.precision.fp8.host_tables import on_device
from dsplugins.plugins.precision.fp8.swiglu import SwigluKept

TOKENS: Mapping[str, int] = {
    "rows_kernel": 32,
    "swiglu_rows_kernel": 16,
    "swiglu_gradient_kernel": 8,
    "e5m6_pack_kernel": 4,
    "e5m6_unpack_kernel": 8,
}
"""Tiles of 1 x 128 that one program makes: on an H200 each is fastest so."""
CHANNELS, OF_CODES, SWIGLU = 64, 128, 32
"""Channels of 128 tokens that one program of the column kernels makes; from codes; by way of SwiGLU."""
WARPS: Mapping[str, int] = {"blocks_kernel": 8, "e5m6_pack_kernel": 1, "e5m6_unpack_kernel": 2}
"""Of a program; 4 elsewhere."""

NUMBERS = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Formats of what stands outside of products."""


class TritonCasts:
    """All of `arithmetic.Arithmetic` but its products, on CUDA.

    Scales of rows lie as Hopper's products want them, [K / 128, T] seen as [T, K / 128].
    """

    def rows(self, x: torch.Tensor, power_of_two: bool, smallest: float = SMALLEST_AMAX) -> Quantised:
        """[T, K] in tiles of 1 x 128."""
        x = x.contiguous()
        codes, scales = _row_outputs(x.shape[0], x.shape[1], x.device)
        block = TOKENS["rows_kernel"]
        grid = (triton.cdiv(x.shape[0], block) * scales.shape[0],)
        if x.numel():
            kernels.rows_kernel[grid](x, codes, scales, *x.shape, bits_of(smallest), power_of_two, block)
        return Quantised(codes, scales.t(), ROW)

    def swiglu_rows(self, inner: torch.Tensor, probs: torch.Tensor | None, power_of_two: bool) -> Quantised:
        """SwiGLU and `rows` in one kernel; probs [T] must be contiguous."""
        inner, (tokens, width) = inner.contiguous(), (inner.shape[0], inner.shape[1] // 2)
        codes, scales = _row_outputs(tokens, width, inner.device)
        block = TOKENS["swiglu_rows_kernel"]
        grid = (triton.cdiv(tokens, block) * scales.shape[0],)
        if inner.numel():
            given = inner if probs is None else probs.contiguous()
            swiglu_kernels.swiglu_rows_kernel[grid](
                inner, given, codes, scales, tokens, width, bits_of(SMALLEST_AMAX),
                probs is not None, power_of_two, block,
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
        table, codes, scales = _column_outputs(splits, channels, device)
        quantised = isinstance(x, Quantised)
        block = OF_CODES if quantised else CHANNELS
        if len(table):
            kernels.columns_kernel[(len(table) * triton.cdiv(channels, block),)](
                values, scales_in, codes.view(torch.int32), scales, table, channels,
                *scales_in.stride(), bits_of(smallest), quantised, power_of_two, block,
            )  # fmt: skip
        return Columns(codes, scales, splits)

    def swiglu_columns(self, kept: SwigluKept, splits: Sequence[int], power_of_two: bool) -> Columns:
        """SwiGLU and `columns` in one kernel, from the codes of its input."""
        channels = kept.channels
        if channels % TILE:  # a tile of the input has gates as well as ups
            return self.columns(kept.active(), splits, power_of_two)
        codes_in, scales_in = kept.inner.codes.contiguous(), kept.inner.scales
        table, codes, scales = _column_outputs(splits, channels, codes_in.device)
        if len(table):
            probs = scales_in if kept.probs is None else kept.probs.contiguous()
            swiglu_kernels.swiglu_columns_kernel[(len(table) * triton.cdiv(channels, SWIGLU),)](
                codes_in, scales_in, probs, codes.view(torch.int32), scales, table, channels,
                *scales_in.stride(), bits_of(SMALLEST_AMAX), kept.probs is not None, NUMBERS[kept.dtype],
                power_of_two, SWIGLU,
            )  # fmt: skip
        return Columns(codes, scales, splits)

    def swiglu_gradient(self, kept: SwigluKept, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gradients of SwiGLU's input and of probs in one kernel."""
        channels = kept.channels
        if channels % TILE:
            return swiglu.backward(kept, dy)
        codes, scales, dy = kept.inner.codes.contiguous(), kept.inner.scales, dy.contiguous()
        tokens, device = codes.shape[0], codes.device
        dinner = torch.empty(codes.shape, dtype=kept.dtype, device=device)
        shares = torch.empty(channels // TILE, tokens, device=device)
        block = TOKENS["swiglu_gradient_kernel"]
        if tokens:
            probs = scales if kept.probs is None else kept.probs.contiguous()
            swiglu_kernels.swiglu_gradient_kernel[(triton.cdiv(tokens, block) * (channels // TILE),)](
                codes, scales, probs, dy, dinner, shares, tokens, channels, *scales.stride(),
                kept.probs is not None, block,
            )  # fmt: skip
        return dinner, None if kept.probs is None else shares.sum(0).to(kept.probs.dtype)

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
            weight, codes, scales, rows, columns, down, across, bits_of(SMALLEST_AMAX),
            power_of_two, transposed, num_warps=WARPS["blocks_kernel"],
        )  # fmt: skip
        return Quantised(codes, scales, SQUARE)

    def pack(self, x: torch.Tensor) -> Packed:
        """[T, K] in E5M6, two numbers in three bytes."""
        x, (tokens, channels) = x.contiguous(), x.shape
        packed = torch.empty(tokens, 3 * -(-channels // 2), dtype=torch.uint8, device=x.device)
        scales = torch.empty(triton.cdiv(channels, TILE), tokens, device=x.device)
        name = "e5m6_pack_kernel"
        if x.numel():
            into, words = _words(packed, channels)
            e5m6_kernels.e5m6_pack_kernel[(triton.cdiv(tokens, TOKENS[name]), scales.shape[0])](
                x, into, scales, tokens, channels, bits_of(SMALLEST_AMAX), words, TOKENS[name],
                num_warps=WARPS[name],
            )  # fmt: skip
        return Packed(packed, scales.t(), channels)

    def unpack(self, packed: Packed) -> torch.Tensor:
        """BF16 [T, K]."""
        source, (tokens, channels) = packed.bytes.contiguous(), (packed.bytes.shape[0], packed.columns)
        y = torch.empty(tokens, channels, dtype=torch.bfloat16, device=source.device)
        block = TOKENS["e5m6_unpack_kernel"]
        if y.numel():
            given, words = _words(source, channels)
            e5m6_kernels.e5m6_unpack_kernel[(triton.cdiv(tokens, block) * packed.scales.shape[1],)](
                given, packed.scales, y, tokens, channels, *packed.scales.stride(), words, block,
                num_warps=WARPS["e5m6_unpack_kernel"],
            )  # fmt: skip
        return y


def _words(packed: torch.Tensor, channels: int) -> tuple[torch.Tensor, bool]:
    """Bytes of E5M6 as 32 bits at a time, where eight numbers, which have three of these, fill the rows."""
    whole_words = channels % 8 == 0
    return packed.view(torch.int32) if whole_words else packed, whole_words


def _row_outputs(tokens: int, channels: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [T, K], and scales [ceil(K / 128), T]."""
    codes = torch.empty(tokens, channels, dtype=E4M3, device=device)
    return codes, torch.empty(triton.cdiv(channels, TILE), tokens, device=device)


def _column_outputs(
    splits: Sequence[int], channels: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The table of tiles on the device, codes of whole tiles, and a row of scales for each."""
    (table,) = _table(tuple(splits), channels, device=device)
    codes = torch.empty(sum(map(whole, splits)) * channels, dtype=E4M3, device=device)
    return table, codes, torch.empty(len(table), channels, device=device)


@on_device
def _table(splits: tuple[int, ...], channels: int) -> tuple[torch.Tensor]:
    """`columns.tiles`. Both operands of a weight gradient, and both linears, have the same."""
    return (torch.tensor(tiles(splits, channels), dtype=torch.int64).view(-1, 4),)
