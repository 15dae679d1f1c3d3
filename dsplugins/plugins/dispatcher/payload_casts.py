"""Starts the Triton kernels of the payload. Imported from hook bodies only: it needs triton."""

from __future__ import annotations

import torch
import triton

from dsplugins.numerics.tiles import TILE, bits_of
from dsplugins.plugins.dispatcher import payload_kernels

TOKENS = 32
"""Tiles of 1 x 128 that one program makes."""
WORD: int = payload_kernels.ALIGNMENT.value
"""Bytes that are moved at once where rows are a multiple of that long: V3's 7168 + 56 are."""


def pack(rows: torch.Tensor, smallest: float) -> torch.Tensor:
    """See `fp8_payload.pack`."""
    rows, (tokens, channels) = rows.contiguous(), rows.shape
    tiles = triton.cdiv(channels, TILE)
    packed = torch.empty(tokens, channels + tiles, dtype=torch.uint8, device=rows.device)
    if packed.numel():
        width, aligned = _width(packed)
        payload_kernels.pack_kernel[(triton.cdiv(tokens, TOKENS) * tiles,)](
            rows, packed, tokens, channels, width, bits_of(smallest), aligned, TOKENS
        )
    return packed


def unpack(packed: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """See `fp8_payload.unpack`."""
    packed, tokens = packed.contiguous(), packed.shape[0]
    rows = torch.empty(tokens, channels, dtype=dtype, device=packed.device)
    if rows.numel():
        width, aligned = _width(packed)
        payload_kernels.unpack_kernel[(triton.cdiv(tokens, TOKENS) * triton.cdiv(channels, TILE),)](
            packed, rows, tokens, channels, width, aligned, TOKENS
        )
    return rows


def _width(packed: torch.Tensor) -> tuple[int, bool]:
    """Length of a row, in words where it is a multiple of those; whether it is."""
    width = packed.shape[1]
    return (width // WORD, True) if width % WORD == 0 else (width, False)
