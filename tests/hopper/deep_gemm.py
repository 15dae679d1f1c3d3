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


def fp8_gemm_nt(a, b, d, c=None, recipe=None):
    CALLS.append("fp8_gemm_nt")
    operand(*a, a[0].shape[0])
    operand(*b, tiles(b[0].shape[0]))
    assert d.dtype == torch.bfloat16 and d.is_contiguous() and c is None, "what the 1D2D kernel writes"
    assert d.shape == (a[0].shape[0], b[0].shape[0])
    d.copy_(numbers(*a) @ numbers(*b).t())


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


def k_grouped_fp8_gemm_nt_contiguous(a, b, d, ks, ks_tensor, c):
    CALLS.append("k_grouped")
    (left, left_scales), (right, right_scales), (_, m, n) = a, b, d.shape
    assert d.dtype == torch.float32 and d.is_contiguous() and c is d and len(ks) == len(d)
    assert (
        ks_tensor.dtype == torch.int32 and ks_tensor.tolist() == list(ks) and all(k % TILE == 0 for k in ks)
    )
    assert left.is_contiguous() and right.is_contiguous()
    assert left.numel() == sum(ks) * m and right.numel() == sum(ks) * n
    assert left_scales.shape == (m, sum(ks) // TILE) and right_scales.shape == (n, sum(ks) // TILE)
    start = 0
    for group, k in enumerate(ks):
        run, across = slice(start, start + k), slice(start // TILE, (start + k) // TILE)
        x = numbers(left[run.start * m : run.stop * m].view(m, k), left_scales[:, across])
        y = numbers(right[run.start * n : run.stop * n].view(n, k), right_scales[:, across])
        d[group] += x @ y.t()
        start += k
