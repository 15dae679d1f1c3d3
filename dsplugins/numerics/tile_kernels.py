"""What Triton kernels of several plugins are made of: tiles of 1 x 128, their scales, their codes.

Codes and scales are those of `tiles`, to the bit: what is divided there is divided here, too, by products
with their remainders, and a tile's largest magnitude is found among integers, in whose order NaN stands
above infinity and is not lost. Imported from hook bodies only: it needs triton, but no GPU.
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
OPPOSITE = tl.constexpr(0x7F000000)
"""What the bits of a power of two and those of its inverse add up to."""


@triton.jit
def magnitude(values: tl.tensor) -> tl.tensor:
    """float32 -> int32 in the same order of size, NaN above all."""
    return values.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def scale_of(
    largest: tl.tensor, smallest: tl.tensor, POWER_OF_TWO: tl.constexpr, BY: tl.constexpr = TOP
) -> tl.tensor:
    """The scale of a tile whose largest `magnitude` this is, but at least `smallest`, that takes it to BY."""
    amax = tl.maximum(largest, smallest).to(tl.float32, bitcast=True)
    scale = amax * (1.0 / BY)
    rest = tl.fma(scale, -BY, amax)  # makes it what a division gives, as in `coded`
    scale = tl.where(scale < float("inf"), tl.fma(rest, 1.0 / BY, scale), scale)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        up = ((bits + MANTISSA) >> MANTISSA_BITS) << MANTISSA_BITS
        scale = tl.where(bits < INFINITY, up, bits).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def inverse(scale: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """1 / scale, rounded once. Of a power of two (2^-126 to 2^126, and a tile's is) it is the opposite
    exponent, found among integers.
    """
    if not POWER_OF_TWO:
        return tl.div_rn(1.0, scale)
    bits = scale.to(tl.int32, bitcast=True)
    beyond = tl.where(bits == INFINITY, 0, bits)
    return tl.where(bits < INFINITY, OPPOSITE - bits, beyond).to(tl.float32, bitcast=True)


@triton.jit
def coded(values: tl.tensor, scale: tl.tensor, POWER_OF_TWO: tl.constexpr) -> tl.tensor:
    """float32 values / scale as E4M3, rounded as a division is.

    By a power of two that is a product with the reciprocal. Else the product's remainder is added once, which
    makes it the division's result (Markstein, IBM J. Res. Dev. 34, 1990); an infinite scale leaves none.
    """
    reciprocal = inverse(scale, POWER_OF_TWO)
    quotient = values * reciprocal
    if not POWER_OF_TWO:
        divisor = tl.where(reciprocal == 0.0, 0.0, -scale)
        quotient = tl.fma(tl.fma(quotient, divisor, values), reciprocal, quotient)
    return quotient.to(tl.float8e4nv)


@triton.jit
def along_rows(channels: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """This program's block of tokens, and its tile of channels: programs go along rows, as memory does."""
    across = tl.cdiv(channels, TILE)
    return tl.program_id(0) // across, tl.program_id(0) % across


@triton.jit
def program_tiles(
    block: tl.tensor, tile: tl.tensor, tokens: tl.tensor, channels: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """BLOCK tiles of a matrix [tokens, channels], each number `tile` of its row: their tokens, where their
    numbers lie, and which of them are there.
    """
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tile * TILE + tl.arange(0, TILE)
    inside = (token[:, None] < tokens) & (channel[None, :] < channels)
    return token, token[:, None] * channels + channel[None, :], inside
