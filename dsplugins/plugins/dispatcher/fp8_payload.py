"""What `fp8_alltoall` sends: E4M3 codes of a row, and behind them an exponent for each 128.

By `payload_casts` on GPUs that have E4M3 (Ada, Hopper and later; their torch brings triton along), by plain
torch elsewhere. The bytes are the same, but for a NaN's, which has several codes. Imported from hook bodies
only: it needs torch.
"""

from __future__ import annotations

from functools import cache

import torch

from dsplugins.numerics.tiles import E4M3, ROW, SMALLEST_AMAX, Quantised, dequantise, quantise


def pack(rows: torch.Tensor, smallest: float = SMALLEST_AMAX) -> torch.Tensor:
    """uint8 [T, H + ceil(H / 128)]: codes of a row [H] and behind them the exponents of its scales (E8M0)."""
    if _has_e4m3(rows.device):
        from dsplugins.plugins.dispatcher import payload_casts

        return payload_casts.pack(rows, smallest)
    quantised = quantise(rows, ROW, power_of_two=True, smallest=smallest)
    exponents = quantised.scales.to(torch.float8_e8m0fnu)
    return torch.cat([quantised.codes.view(torch.uint8), exponents.view(torch.uint8)], dim=1)


def unpack(packed: torch.Tensor, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `pack` made of rows [T, `width`], in numbers of `dtype`."""
    if _has_e4m3(packed.device):
        from dsplugins.plugins.dispatcher import payload_casts

        return payload_casts.unpack(packed, width, dtype)
    codes, exponents = packed.split([width, packed.shape[1] - width], dim=1)
    scales = exponents.contiguous().view(torch.float8_e8m0fnu).float()
    return dequantise(Quantised(codes.contiguous().view(E4M3), scales, ROW)).to(dtype)


@cache
def _has_e4m3(device: torch.device) -> bool:
    """Whether Triton can cast to it there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
