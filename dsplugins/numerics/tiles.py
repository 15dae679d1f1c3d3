"""E4M3 in tiles: what is quantised together, by which scale, and back.

The rule (arXiv 2412.19437, 3.3.2; the reference kernels that DeepSeek published say the same): one scale a
tile, made from the tensor itself, `max(amax, 1e-4) / 448`; codes are `x / scale`, rounded to nearest even.
The scale that is kept multiplies the codes. Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
TILE = 128
SMALLEST_AMAX = 1e-4
"""A tile of nothing but smaller activations or weights is scaled as if this were its largest."""
SMALLEST_GRADIENT = 2.0**-80
"""The same for gradients. Their size goes with the number of tokens and micro-batches that a loss is the mean
of: 1e-4, which is in the kernels that DeepSeek published, would take digits away from all of them."""

MANTISSA_BITS, MANTISSA, INFINITY = 23, 0x7FFFFF, 0x7F800000
"""Of a float32, as integers."""

ROW = (1, TILE)
"""A tile of activations and gradients: one token, 128 channels (or one channel, 128 tokens)."""
SQUARE = (TILE, TILE)
"""A tile of weights."""


@dataclass(frozen=True)
class Quantised:
    """A matrix [M, K] as E4M3 codes and the scales of its tiles; tiles at the far edges may be smaller.

    Or E of them, one a packed expert: then both tensors have E as a first dimension.
    """

    codes: torch.Tensor
    """float8_e4m3fn [M, K]."""
    scales: torch.Tensor
    """float32 [ceil(M / rows), ceil(K / columns)]: what the codes of a tile are multiplied by."""
    tile: tuple[int, int]
    """Rows and columns of a tile."""

    @property
    def t(self) -> Quantised:
        """The transpose, [K, M], of the same codes: right for square tiles in any product."""
        return Quantised(self.codes.mT, self.scales.mT, (self.tile[1], self.tile[0]))

    def split(self, rows: Sequence[int]) -> list[Quantised]:
        """Runs of rows, where a tile is one row high."""
        parts = zip(self.codes.split(list(rows)), self.scales.split(list(rows)), strict=True)
        return [Quantised(codes, scales, self.tile) for codes, scales in parts]

    def unbind(self) -> list[Quantised]:
        """The matrix of each expert."""
        parts = zip(self.codes.unbind(), self.scales.unbind(), strict=True)
        return [Quantised(codes, scales, self.tile) for codes, scales in parts]


def quantise(
    x: torch.Tensor, tile: tuple[int, int], power_of_two: bool = False, smallest: float = SMALLEST_AMAX
) -> Quantised:
    """`x` [M, K] in E4M3, a scale for each `tile`, rounded up to a power of two where asked for (3.3.3).

    NaN stays NaN, and a tile that holds an infinity becomes NaN: neither is clamped away.
    """
    values = x.contiguous().float()  # a transpose is much faster made before all that follows
    scales = scale_of(amax(values, tile), E4M3_MAX, power_of_two, smallest)
    return Quantised((values / spread(scales, tile, values.shape)).to(E4M3), scales, tile)


def unrounded(x: torch.Tensor, tile: tuple[int, int]) -> Quantised:
    """`x` [..., M, K] as it is, in the form of a quantised one: float32 instead of codes, scales of one."""
    tiles = [-(-size // of) for size, of in zip(x.shape[-2:], tile, strict=True)]
    return Quantised(x.float(), x.new_ones(*x.shape[:-2], *tiles, dtype=torch.float32), tile)


def dequantise(q: Quantised) -> torch.Tensor:
    """float32 [M, K]: codes times scales."""
    return q.codes.float() * spread(q.scales, q.tile, q.codes.shape)


def amax(x: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Largest magnitude in each tile of `x` [M, K]: float32 [ceil(M / rows), ceil(K / columns)]."""
    (m, k), (rows, columns) = x.shape, tile
    down, across = -(-m // rows), -(-k // columns)
    if down * rows != m or across * columns != k:
        x = torch.nn.functional.pad(x, (0, across * columns - k, 0, down * rows - m))
    return x.abs().view(down, rows, across, columns).amax(dim=(1, 3))


def scale_of(
    largest: torch.Tensor, top: float, power_of_two: bool, smallest: float = SMALLEST_AMAX
) -> torch.Tensor:
    """The scale that takes `largest` to the largest number of a format, `top`, or (rounded up) below it."""
    # By a tensor on the same device: CUDA multiplies by the rounded inverse of a plain number instead.
    scale = largest.clamp(min=smallest) / torch.full((), top, device=largest.device)
    if not power_of_two:
        return scale
    bits = scale.view(torch.int32)
    up = (bits + MANTISSA) >> MANTISSA_BITS << MANTISSA_BITS
    return torch.where(bits < INFINITY, up, bits).view(torch.float32)


def bits_of(number: float) -> int:
    """Those of a float32 as an integer: a kernel is given the smallest amax so."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


def spread(scales: torch.Tensor, tile: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Scales of tiles as one for each element: [tiles, tiles] -> [M, K]."""
    rows, columns = tile
    if rows > 1:
        scales = scales.repeat_interleave(rows, 0)[: shape[0]]
    if columns > 1:
        scales = scales.repeat_interleave(columns, 1)[:, : shape[1]]
    return scales
