"""Products of routed experts from FP8 operands: each expert has a run of the tokens, of any length.

Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dsplugins.numerics.tiles import ROW, Quantised, dequantise
from dsplugins.plugins.precision.fp8 import products, swiglu
from dsplugins.plugins.precision.fp8.rule import Rule


class ExpertsUp(torch.autograd.Function):
    """x [T, H], sorted by expert, times each expert's weight [E, N, H] transposed: [T, N]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, splits: Sequence[int], rule: Rule, product: Any
    ) -> torch.Tensor:
        codes = products.activation(x, rule)
        ctx.weight, ctx.splits, ctx.rule, ctx.product = weight, splits, rule, product
        ctx.save_for_backward(codes.codes, codes.scales)
        return _outputs(product, codes, weight, splits, rule).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        rule, product, weight, splits = ctx.rule, ctx.product, ctx.weight, ctx.splits
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dy_codes = products.gradient(dy, rule)
            dx = _input_gradients(product, dy_codes, weight, splits, rule).to(dy.dtype)
        if ctx.needs_input_grad[1]:
            codes, scales = ctx.saved_tensors
            x = dequantise(Quantised(codes, scales, ROW))
            dw = products.deliver(weight, _weight_gradients(product, dy, x, splits, rule))
        return dx, dw, None, None, None


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
        product: Any,
    ) -> torch.Tensor:
        ctx.weight, ctx.splits, ctx.rule, ctx.product, ctx.dtype = weight, splits, rule, product, inner.dtype
        stored = products.activation(inner, rule, "kept.x")
        ctx.save_for_backward(stored.codes, stored.scales, probs)
        active = swiglu.forward(inner, probs).to(inner.dtype)
        return _outputs(product, products.activation(active, rule), weight, splits, rule).to(inner.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        rule, product, weight, splits = ctx.rule, ctx.product, ctx.weight, ctx.splits
        codes, scales, probs = ctx.saved_tensors
        inner = dequantise(Quantised(codes, scales, ROW)).to(ctx.dtype)
        dinner = dprobs = dw = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dy_codes = products.gradient(dy, rule)
            dactive = _input_gradients(product, dy_codes, weight, splits, rule).to(ctx.dtype)
            dinner, dprobs = swiglu.backward(inner, probs, dactive)
            dinner = dinner.to(ctx.dtype)
            dprobs = None if dprobs is None else dprobs.to(probs.dtype)
        if ctx.needs_input_grad[2]:
            active = swiglu.forward(inner, probs).to(ctx.dtype)
            dw = products.deliver(weight, _weight_gradients(product, dy, active, splits, rule))
        return dinner, dprobs, dw, None, None, None


def _outputs(
    product: Any, x: Quantised, weight: torch.Tensor, splits: Sequence[int], rule: Rule
) -> torch.Tensor:
    parts = zip(_rows(x, splits), _each(weight), strict=True)
    return torch.cat([products.output(product, part, w, rule) for part, w in parts])


def _input_gradients(
    product: Any, dy: Quantised, weight: torch.Tensor, splits: Sequence[int], rule: Rule
) -> torch.Tensor:
    parts = zip(_rows(dy, splits), _each(weight), strict=True)
    return torch.cat([products.input_gradient(product, part, w, rule) for part, w in parts])


def _weight_gradients(
    product: Any, dy: torch.Tensor, x: torch.Tensor, splits: Sequence[int], rule: Rule
) -> torch.Tensor:
    """FP32 [E, N, K]; tiles along tokens never reach into the next expert's."""
    parts = zip(dy.split(splits), x.split(splits), strict=True)
    return torch.stack([products.weight_gradient(product, g, a, rule) for g, a in parts])


def _each(weight: torch.Tensor) -> Sequence[torch.Tensor]:
    """The matrix of each expert; a plain linear's is the only one."""
    return weight.unbind(0) if weight.dim() == 3 else (weight,)


def _rows(q: Quantised, splits: Sequence[int]) -> list[Quantised]:
    """The rows of each expert; tiles are one row high."""
    pairs = zip(q.codes.split(splits), q.scales.split(splits), strict=True)
    return [Quantised(codes, scales, q.tile) for codes, scales in pairs]
