"""The gate's product in plain torch: core's takes Transformer Engine's kernel wherever that is installed."""

from __future__ import annotations

from typing import Any

import torch


class GateLogits(torch.autograd.Function):
    """`apply(input [..., H], weight [E, H], bias [E] or None, dtype)`: logits [..., E] in `dtype`.

    Keeps input and weight for backward as they came, not in `dtype`. Same numbers as core without Transformer
    Engine (moe_utils.py, `router_gating_linear`).
    """

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.dtype, ctx.bias = dtype, None if bias is None else bias.dtype
        rows = input.reshape(-1, input.shape[-1]).to(dtype)
        added = None if bias is None else bias.to(dtype)
        logits = torch.nn.functional.linear(rows, weight.to(dtype), added)
        return logits.view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])
        rows = input.reshape(-1, input.shape[-1]).to(ctx.dtype)
        to_input = (grad @ weight.to(ctx.dtype)).to(input.dtype).view_as(input)
        to_weight = (grad.t() @ rows).to(weight.dtype)
        to_bias = None if ctx.bias is None else grad.sum(dim=0).to(ctx.bias)
        return to_input, to_weight, to_bias, None


__all__ = ["GateLogits"]
