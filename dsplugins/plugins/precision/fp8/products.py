"""The three products of a linear, from operands in FP8 (arXiv 2412.19437, 3.3.1 and 3.3.2).

Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dsplugins.numerics.tiles import ROW, SMALLEST_GRADIENT, SQUARE, Quantised, quantise

if TYPE_CHECKING:
    from dsplugins.plugins.precision.fp8.rule import Rule

Product = Callable[[Quantised, Quantised], torch.Tensor]
"""a [M, K] times b [N, K] transposed, FP32 [M, N]; see `reference.product`."""


def activation(x: torch.Tensor, rule: Rule, operand: str = "fprop.x") -> Quantised:
    """An input [T, K] in tiles of 128 channels of a token; `operand` is what it is called to who watches."""
    return rule.watch.saw(operand, x, quantise(x, ROW, rule.input))


def output(product: Product, x: Quantised, weight: torch.Tensor, rule: Rule) -> torch.Tensor:
    """x [T, K] times `weight` [N, K] transposed: FP32 [T, N]."""
    return product(x, rule.watch.saw("fprop.w", weight, quantise(weight, SQUARE, rule.weight)))


def gradient(dy: torch.Tensor, rule: Rule, operand: str = "dgrad.dy") -> Quantised:
    """A gradient of an output [T, N] in tiles of 128 channels of a token."""
    return rule.watch.saw(operand, dy, quantise(dy, ROW, rule.gradient, SMALLEST_GRADIENT))


def input_gradient(product: Product, dy: Quantised, weight: torch.Tensor, rule: Rule) -> torch.Tensor:
    """dy [T, N] times `weight` [N, K]: FP32 [T, K]. Square tiles serve both directions."""
    return product(dy, quantise(weight, SQUARE, rule.weight).t)


def weight_gradient(product: Product, dy: torch.Tensor, x: torch.Tensor, rule: Rule) -> torch.Tensor:
    """dy [T, N] transposed times x [T, K]: FP32 [N, K]; both in tiles of 128 tokens of one channel."""
    return product(gradient(dy.t(), rule, "wgrad.dy"), activation(x.t(), rule, "wgrad.x"))


def deliver(weight: Any, gradient: torch.Tensor) -> torch.Tensor:
    """Add an FP32 gradient to `weight.main_grad`, unrounded; returns what autograd is to be given.

    Core's DDP makes `main_grad` and knows by `grad_added_to_main_grad` that it has it already; what autograd
    carries then only tells that this weight is done. Without DDP, autograd gets the gradient itself.
    """
    gradient = gradient.view_as(weight)
    if getattr(weight, "main_grad", None) is None or not hasattr(weight, "grad_added_to_main_grad"):
        return gradient.to(weight.dtype)
    weight.main_grad.add_(gradient)
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)
