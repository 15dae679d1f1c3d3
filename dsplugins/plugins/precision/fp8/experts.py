"""Products of routed experts from FP8 operands: each expert has a run of the tokens, of any length.

Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dsplugins.numerics.tiles import ROW, Quantised
from dsplugins.plugins.precision.fp8 import products, swiglu
from dsplugins.plugins.precision.fp8.rule import Rule


class ExpertsUp(torch.autograd.Function):
    """x [T, H], sorted by expert, times each expert's weight [E, N, H] transposed: [T, N]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, splits: Sequence[int], rule: Rule
    ) -> torch.Tensor:
        codes = products.activation(x, rule)
        ctx.weight, ctx.splits, ctx.rule = weight, splits, rule
        ctx.save_for_backward(codes.codes, codes.scales)
        return products.output(codes, weight, splits, rule, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        rule, weight, splits = ctx.rule, ctx.weight, ctx.splits
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = products.input_gradient(products.gradient(dy, rule), weight, splits, rule, dy.dtype)
        if ctx.needs_input_grad[1]:
            codes, scales = ctx.saved_tensors
            kept = Quantised(codes, scales, ROW)
            dw = products.deliver(weight, dy, kept, splits, rule)
        return dx, dw, None, None


class SwigluDown(torch.autograd.Function):
    """SwiGLU of inner [T, 2I] times probs [T], then each expert's down-projection [E, H, I] (or the only
    one's, [H, I]): [T, H].

    Backward keeps `inner` in FP8, and makes the activation again from that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inner: torch.Tensor,
        probs: torch.Tensor | None,
        weight: torch.Tensor,
        splits: Sequence[int],
        rule: Rule,
    ) -> torch.Tensor:
        ctx.weight, ctx.splits, ctx.rule, ctx.dtype = weight, splits, rule, inner.dtype
        if rule.keeps != "nothing":
            stored = products.activation(inner, rule, "kept.x")
            ctx.save_for_backward(stored.codes, stored.scales, probs)
        return products.output(products.active(inner, probs, rule), weight, splits, rule, inner.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        rule, weight, splits = ctx.rule, ctx.weight, ctx.splits
        codes, scales, probs = ctx.saved_tensors
        kept = swiglu.SwigluKept(Quantised(codes, scales, ROW), probs, ctx.dtype)
        dinner = dprobs = dw = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dactive = products.input_gradient(products.gradient(dy, rule), weight, splits, rule, ctx.dtype)
            dinner, dprobs = rule.arithmetic.swiglu_gradient(kept, dactive)
        if ctx.needs_input_grad[2]:
            dw = products.deliver(weight, dy, kept, splits, rule)
        return dinner, dprobs, dw, None, None
