"""The payload of `fp8_alltoall` as Triton kernels: rows to bytes and back, each in one pass.

The bytes of `fp8_payload`, but for the codes of NaN. `payload_casts` starts them. Imported from hook bodies
only: it needs triton, but no GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsplugins.numerics.tile_kernels import TILE, along_rows, coded, magnitude, program_tiles, scale_of

EXPONENT = tl.constexpr(23)
"""Where a float32 has its exponent, which is all that a power of two has: a byte of E8M0."""
NAN_BYTE = tl.constexpr(255)
ALIGNMENT = tl.constexpr(8)


@triton.jit
def row_starts(token: tl.tensor, width: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """Where rows of `width` bytes begin; ALIGNED: `width` counts words of eight, which are moved as such."""
    return token * (width * ALIGNMENT) if ALIGNED else token * width


@triton.jit
def pack_kernel(
    x: tl.tensor,
    packed: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    width: tl.tensor,
    smallest: tl.tensor,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """x [tokens, channels] -> bytes [tokens, width]: codes, then an exponent for each tile. A program: BLOCK
    tiles.
    """
    block, tile = along_rows(channels)
    token, at, inside = program_tiles(block, tile, tokens, channels, BLOCK)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(magnitude(values), axis=1), smallest, True)
    codes = coded(values, scale[:, None], True).to(tl.uint8, bitcast=True)
    row = packed + row_starts(token, width, ALIGNED)
    channel = tile * TILE + tl.arange(0, TILE)
    tl.store(row[:, None] + channel[None, :], codes, mask=inside)
    exponent = scale.to(tl.int32, bitcast=True) >> EXPONENT
    tl.store(row + channels + tile, exponent.to(tl.uint8), mask=token < tokens)


@triton.jit
def unpack_kernel(
    packed: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    width: tl.tensor,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The way back of `pack_kernel`, into y [tokens, channels]: codes times scales, in the format of y."""
    block, tile = along_rows(channels)
    token, at, inside = program_tiles(block, tile, tokens, channels, BLOCK)
    row = packed + row_starts(token, width, ALIGNED)
    channel = tile * TILE + tl.arange(0, TILE)
    codes = tl.load(row[:, None] + channel[None, :], mask=inside, other=0)
    exponent = tl.load(row + channels + tile, mask=token < tokens, other=0).to(tl.int32)
    scale = (exponent << EXPONENT).to(tl.float32, bitcast=True)
    scale = tl.where(exponent == NAN_BYTE, float("nan"), scale)
    values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, None]
    tl.store(y + at, values.to(y.dtype.element_ty), mask=inside)
