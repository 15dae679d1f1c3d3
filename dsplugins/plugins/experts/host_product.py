"""The grouped product on the CPU, with weight gradients that go straight to where core sums them.

Without this, the gradients of all experts are written in the weight's dtype, and megatron-core's
data-parallel wrapper adds that tensor to the FP32 sums: for the weights of 64 experts of 512 x 512 a third of
the time that all their products take. One expert's gradient is still in the cache when it is added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import grouped_mm


class HostProduct(torch.autograd.Function):
    """Rows [T, K] sorted by expert, weight [E, N, K], ends int32 [E] -> [T, N]; `F.grouped_mm` to the bit."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Expert e takes the rows from `ends[e - 1]` to `ends[e]`."""
        ctx.save_for_backward(rows, weight)
        ctx.weight, ctx.ends = weight, ends  # the parameter itself: core keeps its sums on it
        return grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Gradients of rows and weight; the second is not to be read where core's sums exist."""
        rows, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_weight = _of_weight(ctx.weight, grad, rows, ctx.ends.tolist()) if ctx.needs_input_grad[1] else None
        of_rows = grouped_mm(grad, weight, offs=ctx.ends) if ctx.needs_input_grad[0] else None
        return of_rows, of_weight, None


def _of_weight(weight: Any, grad: torch.Tensor, rows: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """[E, N, K], or with core's FP32 sums on the parameter (`main_grad`) memory that nobody has written:
    core wants some gradient to be there, and leaves it alone once told that it has been added
    (distributed_data_parallel.py, `_make_backward_post_hook`; its own fused linears do the same)."""
    gradient = torch.empty_like(weight)
    sums = getattr(weight, "main_grad", None)
    for expert, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        if sums is None:
            torch.mm(grad[first:last].t(), rows[first:last], out=gradient[expert])
        elif last > first:
            sums[expert].add_(grad[first:last].t() @ rows[first:last])
    if sums is not None:
        weight.grad_added_to_main_grad = True
    return gradient


__all__ = ["HostProduct"]
