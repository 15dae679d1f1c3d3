"""SwiGLU with its casts as Triton kernels: forward, again in backward, and its gradient.

What an exponential does to the last digit apart, codes and scales are those of `reference`. `casts` starts
them. Imported from hook bodies only: it needs triton, but no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsplugins.numerics.tile_kernels import TILE, program_tiles
from dsplugins.plugins.precision.fp8.kernels import every_fourth, program_columns, store_columns, store_rows


@triton.jit
def rounded(values: tl.tensor, NUMBERS: tl.constexpr) -> tl.tensor:
    """float32 values to NUMBERS and back. To BF16 among integers, in ordinary instructions: a conversion of
    single numbers takes as long as eight of those.
    """
    if tl.bfloat16 == NUMBERS:
        bits = values.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        return tl.where(values == values, nearest, values)
    return values.to(NUMBERS).to(tl.float32)


@triton.jit
def numbers(
    codes: tl.tensor, scales: tl.tensor, inside: tl.tensor, there: tl.tensor, NUMBERS: tl.constexpr
) -> tl.tensor:
    """What codes [tokens, BLOCK] with a scale for each token stand for, rounded to NUMBERS, as float32."""
    coded = tl.load(codes, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales, mask=there, other=0.0)
    return rounded(coded * scale[:, None], NUMBERS)


@triton.jit
def over_sigmoid(y: tl.tensor, x: tl.tensor) -> tl.tensor:
    """y / (1 + exp(-x)), to some units in the last place, of which rounding to BF16 leaves little."""
    return y / (1.0 + tl.exp(-x))


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
    token, tile, at, inside = program_tiles(tokens, channels, BLOCK)
    source = inner + at + token[:, None] * channels  # rows are twice as long there
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + channels, mask=inside, other=0.0).to(tl.float32)
    values = over_sigmoid(gate, gate) * up
    if HAS_PROBS:
        values *= tl.load(probs + token, mask=token < tokens, other=0.0).to(tl.float32)[:, None]
    values = rounded(values, inner.dtype.element_ty)
    store_rows(values, codes, scales, token, tile, at, inside, tokens, smallest, POWER_OF_TWO)


@triton.jit
def activated(
    inner: tl.tensor,
    inner_scales: tl.tensor,
    probs: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    token_stride: tl.tensor,
    tile_stride: tl.tensor,
    HAS_PROBS: tl.constexpr,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHICH: tl.constexpr,
) -> tl.tensor:
    """A fourth of the tile's activation, float32 [32, BLOCK]; see `swiglu_columns_kernel`."""
    token, there, inside = every_fourth(first, count, channel, channels, WHICH)
    from_tile = tl.program_id(1) * BLOCK // TILE
    at = token[:, None] * (2 * channels) + channel[None, :]
    at_scale = token * token_stride + from_tile * tile_stride
    gate = numbers(inner + at, inner_scales + at_scale, inside, there, NUMBERS)
    at_scale += channels // TILE * tile_stride
    up = numbers(inner + at + channels, inner_scales + at_scale, inside, there, NUMBERS)
    values = over_sigmoid(gate, gate) * up
    if HAS_PROBS:
        values *= tl.load(probs + token, mask=there, other=0.0).to(tl.float32)[:, None]
    return rounded(values, NUMBERS)


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
    channel, first, count = program_columns(tiles, BLOCK)
    a = activated(
        inner, inner_scales, probs, first, count, channel, channels, token_stride, tile_stride,
        HAS_PROBS, NUMBERS, BLOCK, 0,
    )  # fmt: skip
    b = activated(
        inner, inner_scales, probs, first, count, channel, channels, token_stride, tile_stride,
        HAS_PROBS, NUMBERS, BLOCK, 1,
    )  # fmt: skip
    c = activated(
        inner, inner_scales, probs, first, count, channel, channels, token_stride, tile_stride,
        HAS_PROBS, NUMBERS, BLOCK, 2,
    )  # fmt: skip
    d = activated(
        inner, inner_scales, probs, first, count, channel, channels, token_stride, tile_stride,
        HAS_PROBS, NUMBERS, BLOCK, 3,
    )  # fmt: skip
    store_columns(a, b, c, d, codes, scales, tiles, channel, channels, smallest, POWER_OF_TWO)


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
    token, tile, at, inside = program_tiles(tokens, channels, BLOCK)
    there = token < tokens
    source = at + token[:, None] * channels  # rows are twice as long there
    at_scale = token * token_stride + tile * tile_stride
    gate = numbers(inner + source, inner_scales + at_scale, inside, there, dy.dtype.element_ty)
    at_scale += channels // TILE * tile_stride
    up = numbers(inner + source + channels, inner_scales + at_scale, inside, there, dy.dtype.element_ty)
    gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = over_sigmoid(1.0, gate)
    silu = gate * sigmoid
    if HAS_PROBS:
        tl.store(dprobs + tile * tokens + token, tl.sum(gradient * silu * up, axis=1), mask=there)
        gradient *= tl.load(probs + token, mask=there, other=0.0).to(tl.float32)[:, None]
    dgate = gradient * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dinner + source, dgate.to(dinner.dtype.element_ty), mask=inside)
    tl.store(dinner + source + channels, (gradient * silu).to(dinner.dtype.element_ty), mask=inside)
