"""SwiGLU with its casts as Triton kernels: forward, again in backward, and its gradient.

What an exponential does to the last digit apart, codes and scales are those of `reference`. `casts` starts
them. Imported from hook bodies only: it needs triton, but no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsplugins.numerics.tile_kernels import TILE, along_rows, program_tiles
from dsplugins.plugins.precision.fp8.kernels import (
    every_fourth,
    program_columns,
    store_columns,
    store_rows,
    tile_tokens,
)

TO_BASE_2 = tl.constexpr(1.4426950408889634)
"""log2(e): exponentials of base 2 are what a GPU has."""


@triton.jit
def rounded(a: tl.tensor, b: tl.tensor, NUMBERS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Two of float32 to NUMBERS and back; to BF16 as halves of a word, which one instruction makes: a
    conversion of a single number takes as long as eight ordinary ones.
    """
    if tl.bfloat16 == NUMBERS:
        low = a.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        high = b.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
        word = low | (high << 16)
        return (word << 16).to(tl.float32, bitcast=True), (word & 0xFFFF0000).to(tl.float32, bitcast=True)
    return a.to(NUMBERS).to(tl.float32), b.to(NUMBERS).to(tl.float32)


@triton.jit
def numbers(codes: tl.tensor, scales: tl.tensor, inside: tl.tensor, there: tl.tensor) -> tl.tensor:
    """What codes [tokens, BLOCK] with a scale for each token stand for, as float32."""
    coded = tl.load(codes, mask=inside, other=0.0).to(tl.float32)
    return coded * tl.load(scales, mask=there, other=0.0)[:, None]


@triton.jit
def gate_and_up(
    inner: tl.tensor,
    scales: tl.tensor,
    inside: tl.tensor,
    there: tl.tensor,
    channels: tl.tensor,
    tile_stride: tl.tensor,
    NUMBERS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both halves of SwiGLU's input from its codes, rounded to NUMBERS, as float32. Given is where the gates
    lie; the ups lie `channels` further on, a multiple of 128.
    """
    gate = numbers(inner, scales, inside, there)
    up = numbers(inner + channels, scales + channels // TILE * tile_stride, inside, there)
    return rounded(gate, up, NUMBERS)


@triton.jit
def over_sigmoid(y: tl.tensor, x: tl.tensor) -> tl.tensor:
    """y / (1 + exp(-x)), to some units in the last place, of which rounding to BF16 leaves little.

    By the square of an inverse root, which is one instruction: an approximate division is five.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -TO_BASE_2))
    return y * (root * root)


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
    """`kernels.rows_kernel` of silu(gate) * up * probs; inner [tokens, 2 * channels], probs [tokens]."""
    block, tile = along_rows(channels)
    token, at, inside = program_tiles(block, tile, tokens, channels, BLOCK)
    source = inner + at + token[:, None] * channels  # rows are twice as long there
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + channels, mask=inside, other=0.0).to(tl.float32)
    values = over_sigmoid(gate, gate) * up
    if HAS_PROBS:
        values *= tl.load(probs + token, mask=token < tokens, other=0.0).to(tl.float32)[:, None]
    values = values.to(inner.dtype.element_ty).to(tl.float32)
    store_rows(values, codes, scales, token, tile, at, inside, tokens, smallest, POWER_OF_TWO)


@triton.jit
def activated(
    inner: tl.tensor,
    inner_scales: tl.tensor,
    probs: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    start: tl.tensor,
    channels: tl.tensor,
    token_stride: tl.tensor,
    tile_stride: tl.tensor,
    HAS_PROBS: tl.constexpr,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHICH: tl.constexpr,
) -> tl.tensor:
    """A fourth of the tile's activation, float32 [32, BLOCK]; see `swiglu_columns_kernel`."""
    channel = start + tl.arange(0, BLOCK)
    token, there, inside = every_fourth(first, count, channel, channels, WHICH)
    at = token[:, None] * (2 * channels) + channel[None, :]
    at_scale = token * token_stride + start // TILE * tile_stride
    gate, up = gate_and_up(inner + at, inner_scales + at_scale, inside, there, channels, tile_stride, NUMBERS)
    values = over_sigmoid(gate, gate) * up
    if HAS_PROBS:
        values *= tl.load(probs + token, mask=there, other=0.0).to(tl.float32)[:, None]
    return values


@triton.jit
def swiglu_columns_kernel(
    inner: tl.tensor,
    inner_scales: tl.tensor,
    probs: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    tiles: tl.tensor,
    channels: tl.tensor,
    token_stride: tl.tensor,
    tile_stride: tl.tensor,
    smallest: tl.tensor,
    HAS_PROBS: tl.constexpr,
    NUMBERS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`kernels.columns_kernel` of silu(gate) * up * probs, from the codes of inner [tokens, 2 * channels].

    NUMBERS is the format that inner and the result are rounded to. `channels` is a multiple of 128, so that
    no tile of inner has both gates and ups.
    """
    tile, start = program_columns(channels, BLOCK)
    first, count = tile_tokens(tiles, tile)
    a = activated(
        inner, inner_scales, probs, first, count, start, channels, token_stride, tile_stride,
        HAS_PROBS, NUMBERS, BLOCK, 0,
    )  # fmt: skip
    b = activated(
        inner, inner_scales, probs, first, count, start, channels, token_stride, tile_stride,
        HAS_PROBS, NUMBERS, BLOCK, 1,
    )  # fmt: skip
    c = activated(
        inner, inner_scales, probs, first, count, start, channels, token_stride, tile_stride,
        HAS_PROBS, NUMBERS, BLOCK, 2,
    )  # fmt: skip
    d = activated(
        inner, inner_scales, probs, first, count, start, channels, token_stride, tile_stride,
        HAS_PROBS, NUMBERS, BLOCK, 3,
    )  # fmt: skip
    a, b = rounded(a, b, NUMBERS)
    c, d = rounded(c, d, NUMBERS)
    channel = start + tl.arange(0, BLOCK)
    store_columns(a, b, c, d, codes, scales, tiles, tile, channel, channels, smallest, POWER_OF_TWO)


@triton.jit
def swiglu_gradient_kernel(
    inner: tl.tensor,
    inner_scales: tl.tensor,
    probs: tl.tensor,
    dy: tl.tensor,
    dinner: tl.tensor,
    dprobs: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    token_stride: tl.tensor,
    tile_stride: tl.tensor,
    HAS_PROBS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The way back of silu(gate) * up * probs, from the codes of inner [tokens, 2 * channels].

    dy [tokens, channels] -> dinner like inner, in the format of dy; dprobs [tiles, tokens], a tile's share.
    `channels` as in `swiglu_columns_kernel`. A program: BLOCK tiles of dy.
    """
    block, tile = along_rows(channels)
    token, at, inside = program_tiles(block, tile, tokens, channels, BLOCK)
    there = token < tokens
    source = at + token[:, None] * channels  # rows are twice as long there
    at_scale = token * token_stride + tile * tile_stride
    gate, up = gate_and_up(
        inner + source, inner_scales + at_scale, inside, there, channels, tile_stride, dy.dtype.element_ty
    )
    gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = over_sigmoid(1.0, gate)
    silu = gate * sigmoid
    if HAS_PROBS:
        tl.store(dprobs + tile * tokens + token, tl.sum(gradient * silu * up, axis=1), mask=there)
        gradient *= tl.load(probs + token, mask=there, other=0.0).to(tl.float32)[:, None]
    dgate = gradient * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dinner + source, dgate.to(dinner.dtype.element_ty), mask=inside)
    tl.store(dinner + source + channels, (gradient * silu).to(dinner.dtype.element_ty), mask=inside)
