"""A stand-in for DeepGEMM's SM90 kernels: the same names, the same demands on how operands lie, plain torch.

Demands are those of `csrc/apis/gemm.hpp` and `tests/generators.py` of DeepGEMM 2.x.
"""

import torch

TILE = 128
CALLS = []
"""What was called, in order."""


def numbers(codes, scales):
    """float32 [M, K] of codes [M, K]; scales [M, tiles] or [M / 128, tiles]."""
    high = 1 if scales.shape[0] == codes.shape[0] else TILE
    spread = scales.repeat_interleave(high, 0)[: codes.shape[0]].repeat_interleave(TILE, 1)
    return codes.float() * spread[:, : codes.shape[1]]


def tiles(size):
    return -(-size // TILE)


def operand(codes, scales, rows):
    assert codes.dtype == torch.float8_e4m3fn and codes.is_contiguous() and codes.shape[-1] % 16 == 0
    assert scales.dtype == torch.float32 and tuple(scales.shape[-2:]) == (rows, tiles(codes.shape[-1]))


def fp8_gemm_nt(a, b, d, c=None, recipe=None, compiled_dims=""):
    assert d.is_contiguous() and d.shape == (a[0].shape[0], b[0].shape[0])
    operand(*a, a[0].shape[0])
    if recipe is None:
        CALLS.append("fp8_gemm_nt")
        operand(*b, tiles(b[0].shape[0]))
        assert d.dtype == torch.bfloat16 and c is None, "what the 1D2D kernel writes"
        d.copy_(numbers(*a) @ numbers(*b).t())
    else:
        CALLS.append("fp8_gemm_nt, both in rows")
        assert recipe == (1, 1, 128)
        operand(*b, b[0].shape[0])
        assert d.dtype == torch.float32 and c.data_ptr() == d.data_ptr(), "what the 1D1D kernel adds to"
        d += numbers(*a) @ numbers(*b).t()


def m_grouped_fp8_gemm_nt_contiguous(a, b, d, grouped_layout):
    CALLS.append("m_grouped")
    (codes, scales), (weights, weight_scales) = a, b
    operand(codes, scales, codes.shape[0])
    operand(weights, weight_scales, tiles(weights.shape[1]))
    assert d.dtype == torch.bfloat16 and d.is_contiguous() and d.shape == (codes.shape[0], weights.shape[1])
    assert grouped_layout.dtype == torch.int32 and grouped_layout.shape == (codes.shape[0],)
    d.fill_(torch.nan)  # rows of nobody are left as they were found
    for start in range(0, len(codes), TILE):
        owners = grouped_layout[start : start + TILE]
        assert len(owners) == TILE and set(owners.tolist()) <= {owners[0].item(), -1}, (
            "a block has one expert"
        )
        rows = slice(start, start + int((owners >= 0).sum()))
        weight = numbers(weights[owners[0]], weight_scales[owners[0]])
        d[rows] = (numbers(codes[rows], scales[rows]) @ weight.t()).to(d.dtype)
