"""E5M6 as Triton kernels, there and back, each in one pass: the bytes and scales of `e5m6`, to the bit.

`casts` starts them. Imported from hook bodies only: it needs triton, but no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsplugins.numerics.tile_kernels import (
    INFINITY,
    MAGNITUDE,
    TILE,
    along_rows,
    inverse,
    magnitude,
    program_tiles,
    scale_of,
)

E5M6_TOP = tl.constexpr(65024.0)
E5M6_NORMAL = tl.constexpr(0x38800000)
"""Bits of 2^-14, the smallest normal number."""
E5M6_BIAS = tl.constexpr((127 - 15) << 6)
"""What float32's exponent is larger by, where E5M6 has its own."""
E5M6_GRID = tl.constexpr(8.0)
"""From here on float32 numbers stand 2^-20 apart, as E5M6's subnormals do: adding it rounds to them."""
E5M6_INFINITY, E5M6_NAN = tl.constexpr(0x7C0), tl.constexpr(0x7E0)


@triton.jit
def e5m6_code(values: tl.tensor) -> tl.tensor:
    """float32 -> 12 bits in an int32, rounded to nearest, ties to even; beyond the largest: infinity."""
    bits = values.to(tl.int32, bitcast=True)
    size = bits & MAGNITUDE
    number = tl.minimum(size, INFINITY)  # rounding a NaN up would carry into the sign
    normal = ((number + 0xFFFF + ((number >> 17) & 1)) >> 17) - E5M6_BIAS
    small = (tl.abs(values) + E5M6_GRID).to(tl.int32, bitcast=True) & 0x7F
    code = tl.where(size < E5M6_NORMAL, small, tl.minimum(normal, E5M6_INFINITY))
    code = tl.where(size > INFINITY, E5M6_NAN, code)
    return code | ((bits >> 20) & 0x800)


@triton.jit
def e5m6_places(
    packed: tl.tensor,
    token: tl.tensor,
    tile: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    TOGETHER: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the three units of TOGETHER numbers lie, [tokens, 128 / TOGETHER], and which are there."""
    group = tile * (TILE // TOGETHER) + tl.arange(0, TILE // TOGETHER)
    groups = (channels + TOGETHER - 1) // TOGETHER
    there = packed + token[:, None] * (3 * groups) + 3 * group[None, :]
    return there, (token[:, None] < tokens) & (group[None, :] < groups)


@triton.jit
def e5m6_pack_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    scales: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    smallest: tl.tensor,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x [tokens, channels] -> bytes [tokens, 3 * ceil(channels / 2)]; scales [tiles, tokens].

    Two numbers are three bytes, the first one in the low bits. WORDS: `packed` is int32, which takes eight
    numbers as three words and wants a multiple of eight channels. A program: BLOCK tiles.
    """
    block, tile = tl.program_id(0), tl.program_id(1)  # across rows: faster than along them here
    token, at, inside = program_tiles(block, tile, tokens, channels, BLOCK)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude(values), axis=1), smallest, True, E5M6_TOP)
    code = e5m6_code(values * inverse(scale, True)[:, None])  # exact: a power of two
    first, second = tl.split(tl.reshape(code, (BLOCK, TILE // 2, 2)))
    three = first | (second << 12)
    if WORDS:
        even, odd = tl.split(tl.reshape(three, (BLOCK, TILE // 4, 2)))
        a, c = tl.split(tl.reshape(even, (BLOCK, TILE // 8, 2)))
        b, d = tl.split(tl.reshape(odd, (BLOCK, TILE // 8, 2)))
        there, within = e5m6_places(packed, token, tile, tokens, channels, 8)
        tl.store(there, a | (b << 24), mask=within)
        tl.store(there + 1, (b >> 8) | (c << 16), mask=within)
        tl.store(there + 2, (c >> 16) | (d << 8), mask=within)
    else:
        there, within = e5m6_places(packed, token, tile, tokens, channels, 2)
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
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The way back of `e5m6_pack_kernel`, into y [tokens, channels]; strides are those of `scales`."""
    block, tile = along_rows(channels)
    token, at, inside = program_tiles(block, tile, tokens, channels, BLOCK)
    if WORDS:
        there, within = e5m6_places(packed, token, tile, tokens, channels, 8)
        word = tl.arange(0, 4)[None, None, :]  # three and one that isn't loaded, side by side as they lie
        words = tl.load(there[:, :, None] + word, mask=within[:, :, None] & (word < 3), other=0)
        even, odd = tl.split(tl.reshape(words, (BLOCK, TILE // 8, 2, 2)))
        low, high = tl.split(even)
        middle, _ = tl.split(odd)
        a, d = low & 0xFFFFFF, (high >> 8) & 0xFFFFFF
        b = ((low >> 24) & 0xFF) | ((middle & 0xFFFF) << 8)
        c = ((middle >> 16) & 0xFFFF) | ((high & 0xFF) << 16)
        three = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        there, within = e5m6_places(packed, token, tile, tokens, channels, 2)
        three = tl.load(there, mask=within, other=0).to(tl.int32)
        three |= tl.load(there + 1, mask=within, other=0).to(tl.int32) << 8
        three |= tl.load(there + 2, mask=within, other=0).to(tl.int32) << 16
    code = tl.interleave(three & 0xFFF, three >> 12)
    values = (code << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale = tl.load(scales + token * token_stride + tile * tile_stride, mask=token < tokens, other=0.0)
    tl.store(y + at, (values * scale[:, None]).to(y.dtype.element_ty), mask=inside)
