"""Casts to E4M3 in tiles as Triton kernels: each reads its input once and makes codes and scales.

Codes and scales are those of `reference`, to the bit (see `numerics.tile_kernels`). `casts` starts them.
Imported from hook bodies only: it needs triton, but no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsplugins.numerics.tile_kernels import TILE, along_rows, coded, magnitude, program_tiles, scale_of

BAND = tl.constexpr(16)
"""Tiles of tokens that follow one another before the next channels: what is read lies along the channels,
what is written along the tokens."""


@triton.jit
def store_rows(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    token: tl.tensor,
    tile: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    tokens: tl.tensor,
    smallest: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
) -> None:
    """Quantise the tiles of `program_tiles`: codes where the numbers were, scales [tiles, tokens]."""
    scale = scale_of(tl.max(magnitude(values), axis=1), smallest, POWER_OF_TWO)
    tl.store(codes + at, coded(values, scale[:, None], POWER_OF_TWO), mask=inside)
    tl.store(scales + tile * tokens + token, scale, mask=token < tokens)


@triton.jit
def rows_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    smallest: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x [tokens, channels] -> codes of the same shape; scales [tiles, tokens]. A program: BLOCK tiles."""
    block, tile = along_rows(channels)
    token, at, inside = program_tiles(block, tile, tokens, channels, BLOCK)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    store_rows(values, codes, scales, token, tile, at, inside, tokens, smallest, POWER_OF_TWO)


@triton.jit
def program_columns(channels: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """This program's tile of 128 tokens, and the first of its BLOCK channels; see BAND."""
    across = tl.cdiv(channels, BLOCK)
    first = tl.program_id(0) // (BAND * across) * BAND
    place = tl.program_id(0) - first * across
    width = tl.minimum(tl.num_programs(0) // across - first, BAND)
    return first + place % width, place // width * BLOCK


@triton.jit
def tile_tokens(tiles: tl.tensor, tile: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The first token of a tile, and how many there are."""
    return tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)


@triton.jit
def every_fourth(
    first: tl.tensor, count: tl.tensor, channel: tl.tensor, channels: tl.tensor, WHICH: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of a tile's tokens numbers WHICH, WHICH + 4, ...: which they are, which of them and which numbers are
    there. Taken so, the four codes that make a word of a column are at one thread.
    """
    at = 4 * tl.arange(0, TILE // 4) + WHICH
    there = at < count
    return first + at, there, there[:, None] & (channel[None, :] < channels)


@triton.jit
def half_words(low: tl.tensor, high: tl.tensor, scale: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """Codes of two tensors [n, BLOCK] by scale [BLOCK], side by side in an int32, as one instruction makes
    them.
    """
    codes = coded(tl.join(low, high), scale[None, :, None], POWER_OF_TWO).to(tl.uint8, bitcast=True)
    low, high = tl.split(codes)
    return low.to(tl.int32) | (high.to(tl.int32) << 8)


@triton.jit
def store_columns(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    tiles: tl.tensor,
    tile: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    smallest: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
) -> None:
    """Quantise values at tokens of `every_fourth`, each [32, BLOCK], along the tokens, and transpose them.

    `codes` is int32: four tokens of a channel at once.
    """
    place = tl.multiple_of(tl.load(tiles + tile * 4 + 2), 128) // 4
    length = tl.multiple_of(tl.load(tiles + tile * 4 + 3), 128) // 4
    largest = tl.maximum(tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(d)))
    scale = scale_of(tl.max(largest, axis=0), smallest, POWER_OF_TWO)
    word = half_words(a, b, scale, POWER_OF_TWO) | (half_words(c, d, scale, POWER_OF_TWO) << 16)
    there = codes + place + channel[:, None] * length + tl.arange(0, TILE // 4)[None, :]
    tl.store(there, tl.trans(word), mask=(channel < channels)[:, None])
    tl.store(scales + tile.to(tl.int64) * channels + channel, scale, mask=channel < channels)


@triton.jit
def column_values(
    x: tl.tensor,
    x_scales: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    start: tl.tensor,
    channels: tl.tensor,
    token_stride: tl.tensor,
    tile_stride: tl.tensor,
    QUANTISED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHICH: tl.constexpr,
) -> tl.tensor:
    """A fourth of the tile's numbers from channel `start` on, float32 [32, BLOCK]; see `columns_kernel`."""
    channel = start + tl.arange(0, BLOCK)
    token, there, inside = every_fourth(first, count, channel, channels, WHICH)
    values = tl.load(x + token[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if QUANTISED:
        at_scale = token * token_stride + start // TILE * tile_stride
        values *= tl.load(x_scales + at_scale, mask=there, other=0.0)[:, None]
    return values


@triton.jit
def columns_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    tiles: tl.tensor,
    channels: tl.tensor,
    token_stride: tl.tensor,
    tile_stride: tl.tensor,
    smallest: tl.tensor,
    QUANTISED: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Transpose x [tokens, channels] and quantise it along the tokens, in one go.

    A row of `tiles` (int64 [n, 4]) says of 128 tokens: the first, how many they are, where their codes go,
    and how far the next channel's are from there; missing tokens become zeros. `codes` is int32, scales are
    [n, channels]. QUANTISED: x holds codes, with a scale for each token and 128 channels at `x_scales`. A
    program: a tile of tokens for BLOCK channels, a divisor of 128.
    """
    tile, start = program_columns(channels, BLOCK)
    first, count = tile_tokens(tiles, tile)
    a = column_values(
        x, x_scales, first, count, start, channels, token_stride, tile_stride, QUANTISED, BLOCK, 0
    )
    b = column_values(
        x, x_scales, first, count, start, channels, token_stride, tile_stride, QUANTISED, BLOCK, 1
    )
    c = column_values(
        x, x_scales, first, count, start, channels, token_stride, tile_stride, QUANTISED, BLOCK, 2
    )
    d = column_values(
        x, x_scales, first, count, start, channels, token_stride, tile_stride, QUANTISED, BLOCK, 3
    )
    channel = start + tl.arange(0, BLOCK)
    store_columns(a, b, c, d, codes, scales, tiles, tile, channel, channels, smallest, POWER_OF_TWO)


@triton.jit
def blocks_kernel(
    weight: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    scale_down: tl.tensor,
    scale_across: tl.tensor,
    smallest: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    TRANSPOSED: tl.constexpr,
) -> None:
    """weight [E, rows, columns] -> codes of the same shape, or [E, columns, rows] where TRANSPOSED.

    scales [E, scale_down, scale_across], a tile's at its place in `codes`. A program: one tile of 128 x 128.
    """
    down, across, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = down * TILE + tl.arange(0, TILE)
    column = across * TILE + tl.arange(0, TILE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    matrix = expert * rows * columns
    at = row[:, None] * columns + column[None, :]
    values = tl.load(weight + matrix + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(magnitude(values), axis=1), axis=0), smallest, POWER_OF_TWO)
    tile = coded(values, tl.full((TILE, TILE), 1.0, tl.float32) * scale, POWER_OF_TWO)
    if TRANSPOSED:
        there = column[:, None] * rows + row[None, :]
        within = (column[:, None] < columns) & (row[None, :] < rows)
        tl.store(codes + matrix + there, tl.trans(tile), mask=within)
        tl.store(scales + (expert * scale_down + across) * scale_across + down, scale)
    else:
        tl.store(codes + matrix + at, tile, mask=inside)
        tl.store(scales + (expert * scale_down + down) * scale_across + across, scale)
