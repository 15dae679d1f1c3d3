"""The part of TransformerEngine's NCCL EP that megatron-core calls (pytorch/ep.py), over gloo.

`ep_bootstrap` is as megatron-core 0.19.2 calls it; TransformerEngine 2.20 has one more parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from transports.exchange import Sorted, dense

_BOOTSTRAPPED = False
_STATE: dict[str, Any] = {}


def ep_bootstrap(
    ep_group,
    num_experts,
    max_tokens_per_rank,
    recv_capacity_per_rank,
    hidden_dim,
    max_num_sms=0,
    zero_copy=False,
):
    global _BOOTSTRAPPED
    _BOOTSTRAPPED = True
    _STATE.update(group=ep_group, experts=num_experts, hidden=hidden_dim)


def ep_finalize():
    global _BOOTSTRAPPED
    _BOOTSTRAPPED = False


class EpBuffer:
    """State of one dispatch and its combine."""

    def __init__(
        self,
        top_k,
        max_tokens_per_rank,
        hidden_dim,
        num_local_experts,
        recv_capacity_per_rank=None,
        alignment=0,
    ):
        assert _BOOTSTRAPPED and hidden_dim == _STATE["hidden"]
        self.capacity, self.top_k = recv_capacity_per_rank, top_k
        self.routes: Sorted


def ep_dispatch(buffer, tokens, topk_idx, topk_weights, *, recv_tokens=None, recv_topk_weights=None):
    assert topk_idx.shape[1] == buffer.top_k and topk_weights.dtype == torch.float32
    chosen = dense(topk_idx, torch.ones_like(topk_idx), _STATE["experts"]).bool()
    buffer.routes = Sorted(chosen, _STATE["group"])
    received, weights = _Dispatch.apply(tokens, topk_weights, topk_idx, buffer.routes, buffer.capacity)
    return received, weights, buffer.routes.counts


def ep_combine(buffer, expert_out, *, num_local_tokens=None, grad_out=None):
    assert expert_out.shape[0] == buffer.capacity and num_local_tokens == buffer.routes.tokens
    return _Combine.apply(expert_out, buffer.routes)


def _padded(x, capacity):
    assert len(x) <= capacity, "more tokens than the buffer holds"
    return torch.cat([x, x.new_zeros(capacity - len(x), *x.shape[1:])])


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weights_TK, indices_TK, routes, capacity):
        ctx.routes, ctx.indices = routes, indices_TK
        probs = routes.probs(dense(indices_TK, weights_TK, _STATE["experts"]))
        return _padded(routes.dispatch(tokens), capacity), _padded(probs, capacity)

    @staticmethod
    def backward(ctx, grad_tokens, grad_probs):
        held = int(ctx.routes.counts.sum())
        probs = ctx.routes.probs_back(grad_probs[:held]).gather(1, ctx.indices)
        return ctx.routes.combine(grad_tokens[:held]), probs, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, expert_out, routes):
        ctx.routes, ctx.capacity = routes, len(expert_out)
        return routes.combine(expert_out[: int(routes.counts.sum())])

    @staticmethod
    def backward(ctx, grad):
        return _padded(ctx.routes.dispatch(grad), ctx.capacity), None
