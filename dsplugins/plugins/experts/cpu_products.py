"""Grouped products in 16 bits on a CPU, in few shapes.

Torch hands each expert's product to oneDNN, which compiles a kernel for each shape, in about half a
millisecond: ten times what a small expert's product takes, and counts of tokens are others in every step.
Here rows are rounded up to one of few sizes, whose kernels are compiled once. What is added are rows that
nobody reads, or zeros in sums: no bit of a result changes.

Shape legend: T tokens sorted by expert, E experts, K and N a matrix' sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.functional import pad

SMALLEST = 32
"""Rows: sizes are its multiples up to 512, multiples of 64 up to 1024, of 128 up to 2048, and so on."""


class FewShapes(torch.autograd.Function):
    """Each expert's tokens times its matrix: [T, K], [E, N, K] -> [T, N]; `splits` are tokens per expert."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, splits: Sequence[int]) -> torch.Tensor:
        """In the type of `tokens`."""
        ctx.save_for_backward(tokens, weight)
        ctx.splits = splits
        return _by_rows(tokens, weight.transpose(1, 2), splits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of tokens and weight."""
        tokens, weight = ctx.saved_tensors
        wanted, (grad,) = ctx.needs_input_grad, grads
        of_tokens = _by_rows(grad, weight, ctx.splits) if wanted[0] else None
        of_weight = _over_rows(grad, tokens, weight, ctx.splits) if wanted[1] else None
        return of_tokens, of_weight, None


def rounded(rows: int) -> int:
    """The least size that holds so many rows, at most an eighth more where there are many.

    One row stays one: torch has a product of its own for it, with other sums.
    """
    if rows == 1:
        return 1
    unit = max(SMALLEST, 1 << max(rows - 1, 0).bit_length() >> 4)
    return -(-rows // unit) * unit


def _by_rows(tokens: torch.Tensor, matrices: torch.Tensor, splits: Sequence[int]) -> torch.Tensor:
    """[T, K], [E, K, N] -> [T, N]. An expert's product reaches into rows that the next one overwrites."""
    total = tokens.shape[0]
    spans = [(start, stop, start + rounded(stop - start)) for start, stop in _spans(splits)]
    out = tokens.new_empty(max(end for _, _, end in spans), matrices.shape[2])
    for matrix, (start, stop, end) in zip(matrices, spans, strict=True):
        rows = tokens[start:end] if end <= total else pad(tokens[start:stop], (0, 0, 0, end - stop))
        torch.mm(rows, matrix, out=out[start:end])
    return out[:total]


def _over_rows(
    grad: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, splits: Sequence[int]
) -> torch.Tensor:
    """[T, N], [T, K] -> [E, N, K]: sums over an expert's rows."""
    out = torch.empty_like(weight)
    for matrix, (start, stop) in zip(out, _spans(splits), strict=True):
        missing = rounded(stop - start) - (stop - start)
        left, right = (pad(each[start:stop], (0, 0, 0, missing)) for each in (grad, tokens))
        torch.mm(left.t(), right, out=matrix)
    return out


def _spans(splits: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of each expert."""
    return pairwise(accumulate(splits, initial=0))


__all__ = ["FewShapes", "rounded"]
