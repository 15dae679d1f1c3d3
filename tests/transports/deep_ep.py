"""The part of DeepEP that megatron-core calls, by its signatures (DeepEP's deep_ep/buffer.py), over gloo."""

from __future__ import annotations

import torch
from transports.exchange import Routes, Sorted, dense


class EventHandle:
    """An event of a stream that does everything at once."""


class EventOverlap:
    """What calls wait for; there is nothing to wait for."""

    def __init__(self, event: EventHandle | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        """Everything has happened."""


class Config:
    """Sizes of buffers: none are needed."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes."""
        return hidden_bytes * num_ranks

    get_rdma_buffer_size_hint = get_nvl_buffer_size_hint


class Buffer:
    """Dispatch and combine of ranks that share a node, so that nobody counts by node."""

    num_sms = 20

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(new_num_sms):
        assert new_num_sms % 2 == 0
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks):
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        assert topk_idx.dtype == torch.int64
        chosen = dense(topk_idx, torch.ones_like(topk_idx), num_experts).bool()
        in_rank = chosen.view(len(topk_idx), self.group.size(), -1).any(-1)
        return in_rank.sum(0).int(), None, chosen.sum(0).int(), in_rank, EventOverlap()

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return handle.out(x), None, None, None, None, EventOverlap()
        assert topk_weights.dtype == torch.float32
        experts = len(num_tokens_per_expert)
        routes = Routes(dense(topk_idx, torch.ones_like(topk_idx), experts).bool(), self.group)
        assert routes.sent == num_tokens_per_rank.tolist()
        local = experts // self.group.size()
        indices = routes.out(topk_idx) - self.group.rank() * local
        here = (indices >= 0) & (indices < local)
        weights = routes.out(topk_weights) * here
        counts = routes.local_NL.sum(0).tolist()
        return routes.out(x), indices.where(here, -1), weights, counts, routes, EventOverlap()

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        weights = None if topk_weights is None else handle.back(topk_weights)
        return handle.back(x), weights, EventOverlap()


class HybridEPBuffer:
    """Dispatch and combine with the sorting by expert (deep_ep/hybrid_ep_buffer.py, branch hybrid-ep)."""

    def __init__(
        self,
        group,
        hidden_dim,
        max_num_of_tokens_per_rank,
        num_local_experts,
        use_fp8=False,
        num_sms_dispatch_api=None,
        num_sms_combine_api=None,
        num_sms_preprocessing_api=None,
        num_blocks_permute=None,
        num_blocks_unpermute=None,
    ):
        self.group, self.tokens, self.hidden_dim = group, max_num_of_tokens_per_rank, hidden_dim

    def dispatch_with_permute(
        self,
        *,
        hidden,
        routing_map=None,
        probs=None,
        scaling_factor=None,
        num_of_experts_per_rank=None,
        num_permuted_tokens=None,
        pad_multiple=None,
        handle=None,
        non_blocking=False,
    ):
        assert hidden.shape[1] == self.hidden_dim and pad_multiple is None
        routes = handle or Sorted(routing_map, self.group)
        sorted_probs = None if probs is None else routes.probs(probs)
        return routes.dispatch(hidden), sorted_probs, None, routes.counts, routes

    def combine_with_unpermute(self, *, hidden, probs=None, handle=None, pad_multiple=None):
        return handle.combine(hidden), None if probs is None else handle.probs_back(probs)
