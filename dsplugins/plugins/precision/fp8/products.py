"""The three products of linears under a rule (arXiv 2412.19437, 3.3.1 and 3.3.2).

A plain linear is one expert with all tokens. Imported from hook bodies only: it needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dsplugins.numerics.tiles import ROW, SMALLEST_GRADIENT, SQUARE, Quantised, dequantise, unrounded
from dsplugins.plugins.precision.fp8 import shared_codes, swiglu, weight_codes

if TYPE_CHECKING:
    from dsplugins.plugins.precision.fp8.rule import Rule

Operand = torch.Tensor | Quantised | swiglu.SwigluKept
"""An input as backward has it: numbers, codes, or the codes of what SwiGLU made it from."""


def activation(x: torch.Tensor, rule: Rule, operand: str = "fprop.x", hold: bool = False) -> Quantised:
    """An input [T, K] in tiles of 128 channels of a token; `operand` is what it is called to who watches.

    `hold`: for the next linear that reads it (`shared_codes`).
    """
    if operand == "fprop.x" and "fprop" not in rule.products:
        return unrounded(x, ROW)
    return rule.watch.saw(operand, x, shared_codes.rows(x, rule, hold))


def active(inner: torch.Tensor, probs: torch.Tensor | None, rule: Rule) -> Quantised:
    """SwiGLU of inner [T, 2I] times probs [T] as the input of a linear, [T, I]."""
    if "fprop" not in rule.products:
        return unrounded(swiglu.forward(inner, probs).to(inner.dtype), ROW)
    made = rule.arithmetic.swiglu_rows(inner, probs, rule.input)
    if rule.watch.look is not None:
        rule.watch.saw("fprop.x", swiglu.forward(inner, probs).to(inner.dtype), made)
    return made


def gradient(dy: torch.Tensor, rule: Rule) -> Quantised:
    """A gradient of an output [T, N] in tiles of 128 channels of a token."""
    if "dgrad" not in rule.products:
        return unrounded(dy, ROW)
    return rule.watch.saw("dgrad.dy", dy, rule.arithmetic.rows(dy, rule.gradient, SMALLEST_GRADIENT))


def output(x: Quantised, weight: torch.Tensor, splits: Sequence[int], rule: Rule, dtype: Any) -> torch.Tensor:
    """x [T, K] times each weight [E, N, K] (or the only one's, [N, K]) transposed: [T, N]."""
    stack = _stack(weight)
    if "fprop" not in rule.products:
        return rule.arithmetic.product(x, unrounded(stack, SQUARE), splits, dtype)
    codes = weight_codes.of(weight, stack, rule)
    if rule.watch.look is not None:
        _watch(rule, "fprop.w", stack.unbind(), codes.unbind())
    return rule.arithmetic.product(x, codes, splits, dtype)


def input_gradient(
    dy: Quantised, weight: torch.Tensor, splits: Sequence[int], rule: Rule, dtype: Any
) -> torch.Tensor:
    """dy [T, N] times each weight: [T, K]. Square tiles serve both directions."""
    if "dgrad" not in rule.products:
        return rule.arithmetic.product(dy, unrounded(_stack(weight), SQUARE).t, splits, dtype)
    codes = weight_codes.of(weight, _stack(weight), rule, transposed=True)
    return rule.arithmetic.product(dy, codes, splits, dtype)


def weight_gradient(
    dy: torch.Tensor, x: Operand, splits: Sequence[int], rule: Rule, into: torch.Tensor
) -> None:
    """Add dy [T, N] transposed times x [T, K], in tiles of 128 tokens of a channel, to FP32 [E, N, K]."""
    if "wgrad" not in rule.products:
        rule.arithmetic.weight_gradient(_unrounded_runs(dy, splits), _unrounded_runs(x, splits), into)
        return
    left = rule.arithmetic.columns(dy, splits, rule.gradient, SMALLEST_GRADIENT)
    if isinstance(x, swiglu.SwigluKept):
        right = rule.arithmetic.swiglu_columns(x, splits, rule.input)
    else:
        right = rule.arithmetic.columns(x, splits, rule.input)
    if rule.watch.look is not None:
        _watch(rule, "wgrad.dy", _runs(dy, splits), left)
        _watch(rule, "wgrad.x", _runs(x, splits), right)
    rule.arithmetic.weight_gradient(left, right, into)


def deliver(weight: Any, dy: torch.Tensor, x: Operand, splits: Sequence[int], rule: Rule) -> torch.Tensor:
    """Add `weight_gradient` to `weight.main_grad`, unrounded; returns what autograd is to be given.

    Core's DDP makes `main_grad` and knows by `grad_added_to_main_grad` that it has it already; what autograd
    carries then only tells that this weight is done. Without DDP, autograd gets the gradient itself.
    """
    if getattr(weight, "main_grad", None) is None or not hasattr(weight, "grad_added_to_main_grad"):
        gradient = torch.zeros_like(weight, dtype=torch.float32)
        weight_gradient(dy, x, splits, rule, _stack(gradient))
        return gradient.to(weight.dtype)
    assert weight.main_grad.dtype == torch.float32, "fp8_v3 sets ddp.grad_reduce_in_fp32"
    weight_gradient(dy, x, splits, rule, _stack(weight.main_grad))
    weight.grad_added_to_main_grad = True
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)


def _stack(weight: torch.Tensor) -> torch.Tensor:
    """[E, N, K]; a plain linear's is the only one."""
    return weight if weight.dim() == 3 else weight.unsqueeze(0)


def _runs(x: Operand, splits: Sequence[int]) -> list[torch.Tensor]:
    """Each run's numbers, transposed."""
    if isinstance(x, swiglu.SwigluKept):
        x = x.active()
    numbers = dequantise(x) if isinstance(x, Quantised) else x
    return [run.t() for run in numbers.split(list(splits))]


def _unrounded_runs(x: Operand, splits: Sequence[int]) -> list[Quantised]:
    return [unrounded(run, ROW) for run in _runs(x, splits)]


def _watch(rule: Rule, operand: str, values: Iterable[torch.Tensor], made: Sequence[Quantised]) -> None:
    for one, codes in zip(values, made, strict=True):
        rule.watch.saw(operand, one, codes)
