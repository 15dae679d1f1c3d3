"""Causal attention on the CPU: blocks of queries against the keys that they may see, FP32 inside.

Torch's flash kernel for the CPU wants equal head sizes and is slow backwards, its math path computes the
half of the scores that the mask throws away. Here each block of rows is two products and a softmax;
backward computes the scores again, so that nothing of size S x S is kept.

Shape legend: S sequence, Z micro-batch times heads, D head size of queries and keys, V head size of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

SMALLEST, LARGEST = 32, 128
"""Rows of a block: a quarter of the sequence within these bounds. Smaller blocks waste fewer scores,
larger ones make better products."""


class CausalBlocks(torch.autograd.Function):
    """softmax(q k^T * scale, no key after its query) v: [Z, S, D], [Z, S, D], [Z, S, V] -> [Z, S, V]."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """In the dtype of `query`; products and softmax are FP32, or FP64 for FP64."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        q, k, v = (_wide(tensor) for tensor in (query, key, value))
        blocks = [torch.bmm(_shares(q, k, rows, scale), v[:, : rows.stop]) for rows in _blocks(q.shape[1])]
        return torch.cat(blocks, dim=1).to(query.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of query, key and value, each in its own dtype."""
        query, key, value = ctx.saved_tensors
        q, k, v, grad = (_wide(tensor) for tensor in (query, key, value, grads[0]))
        of_q, of_k, of_v = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
        for rows in _blocks(q.shape[1]):
            seen = slice(0, rows.stop)
            shares = _shares(q, k, rows, ctx.scale)
            of_v[:, seen] += torch.bmm(shares.transpose(1, 2), grad[:, rows])
            of_shares = torch.bmm(grad[:, rows], v[:, seen].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_shares, shares, -1, shares.dtype).mul_(ctx.scale)
            of_q[:, rows] = torch.bmm(of_scores, k[:, seen])
            of_k[:, seen] += torch.bmm(of_scores.transpose(1, 2), q[:, rows])
        return of_q.to(query.dtype), of_k.to(key.dtype), of_v.to(value.dtype), None


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Query [S, B, N, D], key [S, B, N, D], value [S, B, N, V] -> [S, B, N * V]."""
    length, batch = query.shape[:2]
    q, k, v = (tensor.flatten(1, 2).transpose(0, 1) for tensor in (query, key, value))
    out: torch.Tensor = CausalBlocks.apply(q, k, v, scale)
    return out.transpose(0, 1).reshape(length, batch, -1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _blocks(length: int) -> Iterator[slice]:
    rows = min(max(SMALLEST, length // 4), LARGEST)
    return (slice(first, min(first + rows, length)) for first in range(0, length, rows))


def _shares(query: torch.Tensor, key: torch.Tensor, rows: slice, scale: float) -> torch.Tensor:
    """Softmax [Z, rows, keys up to the last row] of one block's scores."""
    scores = torch.bmm(query[:, rows], key[:, : rows.stop].transpose(1, 2)).mul_(scale)
    size = rows.stop - rows.start
    future = torch.ones(size, size, dtype=torch.bool).triu_(1)
    scores[..., rows].masked_fill_(future, float("-inf"))
    return torch.softmax(scores, dim=-1)


__all__ = ["CausalBlocks", "attend"]
