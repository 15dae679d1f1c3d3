"""Tokens to the copies that travel, one for each expert, and back to the sum of a token's copies.

megatron-core adds copies up where they come from, one rounding to their format after the other, by atomics
unless torch is told to be deterministic. Here each token fetches its copies and adds them in FP32: one pass
over memory, the same bits every time.
Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Order:
    """Which token is in each place after sorting by experts, and where each token's copies are."""

    tokens: torch.Tensor
    """int64 [T * k]."""
    places: torch.Tensor
    """int64 [T, k], ascending."""

    @classmethod
    def of(cls, tokens: torch.Tensor, copies: int) -> Order:
        """From the token in each place [T * k], where every token has as many `copies`."""
        return cls(tokens, tokens.argsort(stable=True).view(-1, copies))

    def copied(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T * k, H]."""
        return x.index_select(0, self.tokens)

    def summed(self, copies: torch.Tensor) -> torch.Tensor:
        """[T * k, H] -> [T, H], in the same format."""
        return embedding_bag(self.places, copies, mode="sum")


class ToCopies(torch.autograd.Function):
    """x [T, H] -> [T * k, H], sorted by expert; gradients of a token's copies are added up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: Order) -> torch.Tensor:
        ctx.order = order
        return order.copied(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.order.summed(gradient.contiguous()), None


class FromCopies(torch.autograd.Function):
    """Copies [T * k, H] added up, [T, H]; each gets its token's gradient."""

    @staticmethod
    def forward(ctx: Any, copies: torch.Tensor, order: Order) -> torch.Tensor:
        ctx.order = order
        return order.summed(copies.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.order.copied(gradient), None
