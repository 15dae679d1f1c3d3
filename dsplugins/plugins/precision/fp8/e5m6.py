"""E5M6, the 12-bit format in which the report keeps the output of attention for backward (3.3.3).

One sign bit, five of exponent (bias 15), six of mantissa: FP16 without its last four bits. Largest number
65024, smallest normal 2^-14, smallest 2^-20. Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsplugins.numerics.tiles import ROW, amax, scale_of, spread

E5M6_MAX = 65024.0
SMALLEST_NORMAL = 2.0**-14
SMALLEST = 2.0**-20
KEPT_BITS = 17
"""Bits of float32's mantissa beyond E5M6's."""


@dataclass(frozen=True)
class Packed:
    """A matrix [M, K] in E5M6, two numbers in three bytes; 1 x 128 tiles, power-of-two scales."""

    bytes: torch.Tensor
    """uint8 [M, 3 * ceil(K / 2)]."""
    scales: torch.Tensor
    """float32 [M, ceil(K / 128)]: what the numbers of a tile are multiplied by."""
    columns: int
    """K."""


def rounded(x: torch.Tensor) -> torch.Tensor:
    """float32 -> the nearest E5M6 number (ties to even), as float32. Beyond the largest: infinity."""
    bits = x.float().view(torch.int32)
    odd = (bits >> KEPT_BITS) & 1
    normal = ((bits + (1 << (KEPT_BITS - 1)) - 1 + odd) >> KEPT_BITS << KEPT_BITS).view(torch.float32)
    small = torch.round(x.float() / SMALLEST) * SMALLEST
    nearest = torch.where(x.abs() < SMALLEST_NORMAL, small, normal)
    nearest = torch.where(
        nearest.abs() > E5M6_MAX, torch.copysign(torch.full_like(nearest, torch.inf), x), nearest
    )
    return torch.where(torch.isnan(x), torch.nan, nearest)


def pack(x: torch.Tensor) -> Packed:
    """`x` [M, K] in tiles of 1 x 128. Scales are powers of two: other tiles can follow without an error."""
    values = x.float()
    scales = scale_of(amax(values, ROW), E5M6_MAX, power_of_two=True)
    half = rounded(values / spread(scales, ROW, values.shape)).to(
        torch.float16
    )  # exact: FP16 has four bits more
    codes = (half.view(torch.int16).to(torch.int32) >> 4) & 0xFFF
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    first, second = codes[:, 0::2], codes[:, 1::2]
    three = torch.stack([first & 0xFF, (first >> 8) | ((second & 0xF) << 4), second >> 4], dim=-1)
    return Packed(three.to(torch.uint8).flatten(1), scales, values.shape[1])


def unpack(packed: Packed) -> torch.Tensor:
    """float32 [M, K]."""
    rows = packed.bytes.shape[0]
    low, middle, high = packed.bytes.to(torch.int32).view(rows, packed.bytes.shape[1] // 3, 3).unbind(-1)
    codes = torch.stack([low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)], dim=-1).flatten(1)
    signed = codes << 4  # 16 bits with the sign on top
    half = (signed - ((signed & 0x8000) << 1)).to(torch.int16).view(torch.float16)
    values = half.float()[:, : packed.columns]
    return values * spread(packed.scales, ROW, values.shape)
