"""Casts to E4M3 and E5M6 in tiles as Triton kernels: each reads its input once and makes codes and scales.

Codes and scales are those of `reference`, to the bit: divisions are rounded as IEEE 754 wants, and a tile's
largest magnitude is found among integers, in whose order NaN stands above infinity and is not lost. What
SwiGLU's exponential does to the last digit is the exception. `casts` starts them. Imported from hook bodies
only: it needs triton, but no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(128)
TOP = tl.constexpr(448.0)
E5M6_TOP = tl.constexpr(65024.0)
E5M6_NORMAL = tl.constexpr(2.0**-14)
E5M6_GRID = tl.constexpr(12.0)
"""Numbers about this large stand 2^-20 apart, as E5M6's subnormals do: adding it rounds to them."""
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
    scale = scale_of(tl.max(magnitude(values), axis=1), smallest, POWER_OF_TWO)
    tl.store(codes + at, tl.div_rn(values, scale[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scales + tile * tokens + token, scale, mask=token < tokens)


@triton.jit
def swiglu_rows_kernel(
    inner: tl.tensor,
    probs: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    smallest: tl.tensor,
    HAS_PROBS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`rows_kernel` of silu(gate) * up * probs; inner [tokens, 2 * channels], gate first, probs [tokens]."""
    token, tile, at, inside = program_tiles(tokens, channels, BLOCK)
    source = inner + at + token[:, None] * channels  # rows are twice as long there
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + channels, mask=inside, other=0.0).to(tl.float32)
    values = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    if HAS_PROBS:
        values *= tl.load(probs + token, mask=token < tokens, other=0.0).to(tl.float32)[:, None]
    values = values.to(inner.dtype.element_ty).to(tl.float32)
    scale = scale_of(tl.max(magnitude(values), axis=1), smallest, POWER_OF_TWO)
    tl.store(codes + at, tl.div_rn(values, scale[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scales + tile * tokens + token, scale, mask=token < tokens)


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
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(tiles + tile * 4)
    count = tl.load(tiles + tile * 4 + 1)
    place = tl.load(tiles + tile * 4 + 2)
    length = tl.load(tiles + tile * 4 + 3)
    token = tl.arange(0, TILE)
    inside = (token[:, None] < count) & (channel[None, :] < channels)
    at = (first + token)[:, None] * channels + channel[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if QUANTISED:
        from_tile = tl.program_id(1) * BLOCK // TILE
        at_scale = (first + token) * token_stride + from_tile * tile_stride
        values *= tl.load(x_scales + at_scale, mask=token < count, other=0.0)[:, None]
    scale = scale_of(tl.max(magnitude(values), axis=0), smallest, POWER_OF_TWO)
    coded = tl.div_rn(values, scale[None, :]).to(tl.float8e4nv)
    there = codes + place + channel[:, None] * length + token[None, :]
    tl.store(there, tl.trans(coded), mask=(channel < channels)[:, None])
    tl.store(scales + tile.to(tl.int64) * channels + channel, scale, mask=channel < channels)


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


@triton.jit
def e5m6_code(values: tl.tensor) -> tl.tensor:
    """float32 -> 12 bits in an int32: FP16 without its last four bits, rounded to nearest, ties to even."""
    bits = values.to(tl.int32, bitcast=True)
    normal = ((bits + 0xFFFF + ((bits >> 17) & 1)) >> 17 << 17).to(tl.float32, bitcast=True)
    small = (values + E5M6_GRID) - E5M6_GRID
    nearest = tl.where(tl.abs(values) < E5M6_NORMAL, small, normal)
    nearest = tl.where(values == values, nearest, values)  # NaN
    unsigned = (nearest.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) >> 4) & 0x7FF
    return unsigned | ((bits >> 20) & 0x800)  # the sign of what became zero, too


@triton.jit
def e5m6_pack_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    smallest: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """x [tokens, channels] -> bytes [tokens, 3 * ceil(channels / 2)]; scales [tiles, tokens].

    Two numbers are three bytes, the first one in the low bits. A program: BLOCK tiles.
    """
    token, tile, at, inside = program_tiles(tokens, channels, BLOCK)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude(values), axis=1), smallest, True, E5M6_TOP)
    code = e5m6_code(tl.div_rn(values, scale[:, None]))
    first, second = tl.split(tl.reshape(code, (BLOCK, TILE // 2, 2)))
    three = first | (second << 12)
    pair = tile * (TILE // 2) + tl.arange(0, TILE // 2)
    pairs = (channels + 1) // 2
    there = packed + token[:, None] * (3 * pairs) + 3 * pair[None, :]
    within = (token[:, None] < tokens) & (pair[None, :] < pairs)
    for byte in tl.static_range(3):
        tl.store(there + byte, ((three >> (8 * byte)) & 0xFF).to(tl.uint8), mask=within)
    tl.store(scales + tile * tokens + token, scale, mask=token < tokens)


@triton.jit
def e5m6_unpack_kernel(
    packed: tl.tensor,
    scales: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    token_stride: tl.tensor,
    tile_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The way back of `e5m6_pack_kernel`, into y [tokens, channels]; strides are those of `scales`."""
    token, tile, at, inside = program_tiles(tokens, channels, BLOCK)
    pair = tile * (TILE // 2) + tl.arange(0, TILE // 2)
    pairs = (channels + 1) // 2
    there = packed + token[:, None] * (3 * pairs) + 3 * pair[None, :]
    within = (token[:, None] < tokens) & (pair[None, :] < pairs)
    three = tl.load(there, mask=within, other=0).to(tl.int32)
    three |= tl.load(there + 1, mask=within, other=0).to(tl.int32) << 8
    three |= tl.load(there + 2, mask=within, other=0).to(tl.int32) << 16
    code = tl.interleave(three & 0xFFF, three >> 12)
    values = (code << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale = tl.load(scales + token * token_stride + tile * tile_stride, mask=token < tokens, other=0.0)
    tl.store(y + at, (values * scale[:, None]).to(y.dtype.element_ty), mask=inside)
