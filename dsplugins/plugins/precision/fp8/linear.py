"""A linear whose three products take FP8 operands, under tensor and sequence parallel.

Imported from hook bodies only: it needs torch and megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from dsplugins.numerics import remade
from dsplugins.numerics.tiles import ROW, Quantised
from dsplugins.numerics.watch import Watch
from dsplugins.plugins.precision.fp8 import products
from dsplugins.plugins.precision.fp8.e5m6 import Packed
from dsplugins.plugins.precision.fp8.experts import SwigluDown
from dsplugins.plugins.precision.fp8.rule import Choice, Rule, rule_for
from dsplugins.plugins.precision.fp8.swiglu import SwigluInput


class Fp8Product(torch.autograd.Function):
    """y = x W^T. x [..., K] in 16 bits, W [N, K]; y [..., N] has the format of x.

    Backward keeps the input's codes instead of the input: 1 byte and 1/32 for each number (E5M6: 1.5). Where
    the input is made again for backward, it keeps neither, and casts it once more (`numerics.remade`).
    `gathered` is the tensor-parallel group where x is split along its first dimension (sequence parallel),
    `reduced` the one over which the gradient of x is summed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        rule: Rule,
        gathered: Any,
        reduced: Any,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.again = rule.keeps != "nothing" and remade.noted(flat)
        codes = products.activation(flat, rule, hold=ctx.again)
        ctx.rule, ctx.shape = rule, x.shape
        ctx.gathered, ctx.reduced = gathered, reduced
        ctx.weight = weight  # not a saved tensor: its `main_grad` is added to in backward
        if rule.keeps != "nothing":
            ctx.save_for_backward(*((flat,) if ctx.again else _keep(flat, codes, rule)))
        whole = _gather(codes, gathered)
        y = products.output(whole, weight, [whole.codes.shape[0]], rule, x.dtype)
        return y.view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        rule, weight = ctx.rule, ctx.weight
        flat = dy.reshape(-1, dy.shape[-1])
        all_tokens = [flat.shape[0]]
        dx = dw = None
        wait: Callable[[], object] = _nothing
        if ctx.needs_input_grad[1]:  # on its way while dx is made
            parts = _cast_again(ctx.saved_tensors[0], rule) if ctx.again else ctx.saved_tensors
            kept = [_gathering(part, ctx.gathered) for part in parts]
        if ctx.needs_input_grad[0]:
            dy_codes = products.gradient(flat, rule)
            dx = products.input_gradient(dy_codes, weight, all_tokens, rule, dy.dtype)
            dx, wait = _reduce(dx, ctx.gathered, ctx.reduced)
        if ctx.needs_input_grad[1]:
            x = _kept([arrived() for arrived in kept], rule, weight.shape[1])
            dw = products.deliver(weight, flat, x, all_tokens, rule)
        wait()
        return (dx if dx is None else dx.view(ctx.shape)), dw, None, None, None


def _nothing() -> None:
    """Nothing to wait for."""


def _keep(x: torch.Tensor, codes: Quantised, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of this rank's part of the input, in the format of the rule."""
    return (codes.codes, codes.scales) if _keeps_codes(rule) else _pack(x, rule)


def _cast_again(x: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_keep` would have kept; whoever watches saw it in forward."""
    if not _keeps_codes(rule):
        return _pack(x, rule)
    codes = products.activation(x, rule.forward_only, hold=True)
    return codes.codes, codes.scales


def _keeps_codes(rule: Rule) -> bool:
    """Those of the product in forward, and not another format of the input."""
    return rule.keeps == "e4m3" or "wgrad" not in rule.products


def _pack(x: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    packed = rule.arithmetic.pack(x)
    return packed.bytes, packed.scales


def _kept(saved: Sequence[torch.Tensor], rule: Rule, columns: int) -> torch.Tensor | Quantised:
    """The whole input [T, K] as backward sees it, from what was kept of it."""
    codes, scales = saved
    if _keeps_codes(rule):
        return Quantised(codes, scales, ROW)
    return rule.arithmetic.unpack(Packed(codes, scales, columns))


def _gather(q: Quantised, group: Any) -> Quantised:
    """Rows of all ranks of `group`, in their order."""
    codes, scales = (_gathering(part, group) for part in (q.codes, q.scales))
    return Quantised(codes(), scales(), q.tile)


def _gathering(part: torch.Tensor, group: Any) -> Callable[[], torch.Tensor]:
    """Start to gather rows; what is returned gives them when they are there. No group: they are."""
    if group is None:
        return lambda: part
    as_bytes = part.contiguous().view(torch.uint8)
    whole = as_bytes.new_empty(group.size() * as_bytes.shape[0], *as_bytes.shape[1:])
    wait = _waiting(dist.all_gather_into_tensor(whole, as_bytes, group=group, async_op=True))

    def arrived() -> torch.Tensor:
        wait()
        return whole.view(part.dtype)

    return arrived


def _reduce(dx: torch.Tensor, gathered: Any, reduced: Any) -> tuple[torch.Tensor, Callable[[], object]]:
    """Start summing the gradient of the input; the result, and what to call before it is read."""
    if gathered is not None:
        part = dx.new_empty(dx.shape[0] // gathered.size(), *dx.shape[1:])
        return part, _waiting(dist.reduce_scatter_tensor(part, dx, group=gathered, async_op=True))
    if reduced is not None:
        return dx, _waiting(dist.all_reduce(dx, group=reduced, async_op=True))
    return dx, _nothing


def _waiting(work: dist.Work | None) -> Callable[[], object]:
    assert work is not None, "this rank is in the group"
    return work.wait


class _Fp8Linear:
    """What both linears share: core's own class calls `_forward_impl` for its product, and only for that."""

    choice: ClassVar[Choice] = Choice()
    rule: Rule | None

    @property
    def watches(self) -> Mapping[str, Watch]:
        """See `Watch`; nothing where the linear stays in BF16."""
        return {} if self.rule is None else {"": self.rule.watch}

    def _rule(self, name: str | None, routed: bool) -> Rule | None:
        return rule_for(name or "", routed, self.choice)

    def _forward_impl(
        self,
        input: torch.Tensor | SwigluInput,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        tp_group: Any = None,
        **others: Any,
    ) -> torch.Tensor:
        if self.rule is None:
            return super()._forward_impl(  # type: ignore[misc]
                input=input,
                weight=weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **others,
            )
        if isinstance(input, SwigluInput):
            return self._down(input, weight, self.rule.now())
        y = Fp8Product.apply(
            input,
            weight,
            self.rule.now(),
            tp_group if sequence_parallel else None,
            tp_group if allreduce_dgrad else None,
        )
        return y if bias is None else y + bias

    def _down(self, input: SwigluInput, weight: torch.Tensor, rule: Rule) -> torch.Tensor:
        """The down-projection of an MLP that leaves SwiGLU to it."""
        inner = input.inner.reshape(-1, input.inner.shape[-1])
        y = SwigluDown.apply(inner, input.probs, weight, [inner.shape[0]], rule)
        return y.view(*input.inner.shape[:-1], weight.shape[0])


class Fp8ColumnParallelLinear(_Fp8Linear, ColumnParallelLinear):
    """Core's ColumnParallelLinear with FP8 operands; same parameters, same checkpoint keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rule = self._rule(kwargs.get("tp_comm_buffer_name"), self.is_expert)


class Fp8RowParallelLinear(_Fp8Linear, RowParallelLinear):
    """Core's RowParallelLinear with FP8 operands; same parameters, same checkpoint keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rule = self._rule(kwargs.get("tp_comm_buffer_name"), self.is_expert)
