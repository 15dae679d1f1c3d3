"""What `fp8_alltoall` sends: E4M3 codes of a row, and behind them an exponent for each 128.

By plain torch on a CPU and by `payload_casts` on CUDA, whose torch brings triton along; the bytes are the
same. Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

import torch

from dsplugins.numerics.tiles import E4M3, ROW, SMALLEST_AMAX, Quantised, dequantise, quantise


def pack(rows: torch.Tensor, smallest: float = SMALLEST_AMAX) -> torch.Tensor:
    """uint8 [T, H + ceil(H / 128)]: codes of a row [H] and behind them the exponents of its scales (E8M0)."""
    if rows.is_cuda:
        from dsplugins.plugins.dispatcher import payload_casts

        return payload_casts.pack(rows, smallest)
    quantised = quantise(rows, ROW, power_of_two=True, smallest=smallest)
    exponents = quantised.scales.to(torch.float8_e8m0fnu)
    return torch.cat([quantised.codes.view(torch.uint8), exponents.view(torch.uint8)], dim=1)


def unpack(packed: torch.Tensor, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `pack` made of rows [T, `width`], in numbers of `dtype`."""
    if packed.is_cuda:
        from dsplugins.plugins.dispatcher import payload_casts

        return payload_casts.unpack(packed, width, dtype)
    codes, exponents = packed.split([width, packed.shape[1] - width], dim=1)
    scales = exponents.contiguous().view(torch.float8_e8m0fnu).float()
    return dequantise(Quantised(codes.contiguous().view(E4M3), scales, ROW)).to(dtype)
