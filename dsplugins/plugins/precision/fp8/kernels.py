"""Casts to E4M3 in tiles as Triton kernels: each reads its input once and makes codes and scales.

Codes and scales are those of `reference`, to the bit: divisions are rounded as IEEE 754 wants, and a tile's
largest magnitude is found among integers, in whose order NaN stands above infinity and is not lost. `casts`
starts them. Imported from hook bodies only: it needs triton, but no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(128)
TOP = tl.constexpr(448.0)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
"""All bits of a float32 but its sign."""
INFINITY = tl.constexpr(0x7F800000)
MANTISSA = tl.constexpr(0x7FFFFF)
MANTISSA_BITS = tl.constexpr(23)


@triton.jit
def magnitude(values: tl.tensor) -> tl.tensor:
    """float32 -> int32 in the same order of size, NaN above all."""
    return values.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def scale_of(
    largest: tl.tensor, smallest: tl.tensor, POWER_OF_TWO: tl.constexpr, BY: tl.constexpr = TOP
) -> tl.tensor:
    """The scale of a tile whose largest `magnitude` this is, but at least `smallest`, that takes it to BY."""
    scale = tl.div_rn(tl.maximum(largest, smallest).to(tl.float32, bitcast=True), BY)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        up = ((bits + MANTISSA) >> MANTISSA_BITS) << MANTISSA_BITS
        scale = tl.where(bits < INFINITY, up, bits).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def program_tiles(
    tokens: tl.tensor, channels: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """This program's BLOCK tiles of a matrix [tokens, channels]: their tokens, the tile's number in each row,
    where its numbers lie, and which of them are there.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.program_id(1)
    channel = tile * TILE + tl.arange(0, TILE)
    inside = (token[:, None] < tokens) & (channel[None, :] < channels)
    return token, tile, token[:, None] * channels + channel[None, :], inside


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
    tl.store(codes + at, tl.div_rn(values, scale[:, None]).to(tl.float8e4nv), mask=inside)
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
    token, tile, at, inside = program_tiles(tokens, channels, BLOCK)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    store_rows(values, codes, scales, token, tile, at, inside, tokens, smallest, POWER_OF_TWO)


@triton.jit
def program_columns(
    tiles: tl.tensor, channels: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """This program's BLOCK channels of a tile: channels, tokens, which tokens and which numbers are there."""
    tile = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(tiles + tile * 4)
    count = tl.load(tiles + tile * 4 + 1)
    there = tl.arange(0, TILE) < count
    return channel, first + tl.arange(0, TILE), there, there[:, None] & (channel[None, :] < channels)


@triton.jit
def store_columns(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    tiles: tl.tensor,
    tile: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    smallest: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
) -> None:
    """Quantise values [128 tokens, BLOCK channels] along the tokens, and put them down transposed."""
    place = tl.multiple_of(tl.load(tiles + tile * 4 + 2), 128)  # so that many codes are stored at once
    length = tl.multiple_of(tl.load(tiles + tile * 4 + 3), 128)
    scale = scale_of(tl.max(magnitude(values), axis=0), smallest, POWER_OF_TWO)
    coded = tl.div_rn(values, scale[None, :]).to(tl.float8e4nv)
    there = codes + place + channel[:, None] * length + tl.arange(0, TILE)[None, :]
    tl.store(there, tl.trans(coded), mask=(channel < channels)[:, None])
    tl.store(scales + tile.to(tl.int64) * channels + channel, scale, mask=channel < channels)


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
    and how far the next channel's are from there; missing tokens become zeros. scales [n, channels].
    QUANTISED: x holds codes, with a scale for each token and 128 channels at `x_scales`. A program: a tile of
    tokens for BLOCK channels, a divisor of 128.
    """
    tile = tl.program_id(0)
    channel, token, there, inside = program_columns(tiles, channels, BLOCK)
    values = tl.load(x + token[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if QUANTISED:
        from_tile = tl.program_id(1) * BLOCK // TILE
        at_scale = token * token_stride + from_tile * tile_stride
        values *= tl.load(x_scales + at_scale, mask=there, other=0.0)[:, None]
    store_columns(values, codes, scales, tiles, tile, channel, channels, smallest, POWER_OF_TWO)


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
    coded = tl.div_rn(values, tl.full((TILE, TILE), 1.0, tl.float32) * scale).to(tl.float8e4nv)
    if TRANSPOSED:
        there = column[:, None] * rows + row[None, :]
        within = (column[:, None] < columns) & (row[None, :] < rows)
        tl.store(codes + matrix + there, tl.trans(coded), mask=within)
        tl.store(scales + (expert * scale_down + across) * scale_across + down, scale)
    else:
        tl.store(codes + matrix + at, coded, mask=inside)
        tl.store(scales + (expert * scale_down + down) * scale_across + across, scale)
