"""What the routers here share: the gate, the counts, and how a balance loss is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.moe.router import Router


class CountingRouter(Router):
    """A router that counts its tokens per expert and its balance loss, as `contracts.RouterFactory` asks.

    Buffers: `local_tokens_per_expert` float32 [E], `aux_loss_sum` float32 [], neither saved.
    """

    def __init__(self, config: Any, pg_collection: Any = None, is_mtp_layer: bool = False) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        device = self.weight.device
        experts = config.num_moe_experts
        self.register_buffer(
            "local_tokens_per_expert",
            torch.zeros(experts, dtype=torch.float32, device=device),
            persistent=False,
        )
        self.register_buffer(
            "aux_loss_sum", torch.zeros((), dtype=torch.float32, device=device), persistent=False
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CountingRouter:
        """Move with the module, but keep buffers in float32: in bfloat16 counts stop at 256."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(device=moved.device)
        return self

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [S, B, E] in `moe_router_dtype`; without core's check of devices."""
        dtypes = {"fp32": torch.float32, "fp64": torch.float64}
        dtype = dtypes.get(self.config.moe_router_dtype, input.dtype)
        return router_gating_linear(input, self.weight, self.bias, dtype)

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probs [T, E], map bool [T, E]) from logits [T, E]."""
        raise NotImplementedError

    def count(self, routing_map: torch.Tensor) -> None:
        """Add a micro-batch. Activation recomputing runs the first pass without gradients: counted once."""
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += routing_map.sum(dim=0)

    def attach(self, probs: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """`probs`, whose backward also starts at `loss`, this rank's share of a balance loss."""
        with torch.no_grad():
            self.aux_loss_sum += loss.detach()
        return MoEAuxLossAutoScaler.apply(probs, loss)

    def summed_over_sequence(self, counts: torch.Tensor) -> torch.Tensor:
        """Counts summed over the ranks that hold parts of the same sequences (sequence parallel, CP)."""
        group = self.tp_cp_group
        if group.size() > 1:
            counts = counts.clone()
            torch.distributed.all_reduce(counts, group=group)
        return counts


def scatter(chosen: torch.Tensor, weights: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights [T, K] as dense (probs, map) [T, E]."""
    shape = (chosen.shape[0], experts)
    probs = torch.zeros(shape, dtype=weights.dtype, device=weights.device).scatter(1, chosen, weights)
    routing_map = torch.zeros(shape, dtype=torch.bool, device=weights.device).scatter(1, chosen, True)
    return probs, routing_map


def group_limited(scores: torch.Tensor, topk: int, groups: int | None, kept: int | None) -> torch.Tensor:
    """Indices [T, K] of the top experts among the best groups (report, 2.1.2, node-limited routing).

    scores: [T, E]. A group's score is the sum of its K / `kept` highest ones; only experts of the `kept`
    best groups can be chosen.
    """
    if not groups or not kept or groups == kept:
        return torch.topk(scores, k=topk, dim=1).indices
    tokens, experts = scores.shape
    per_group = scores.view(tokens, groups, experts // groups)
    group_scores = per_group.topk(topk // kept, dim=-1).values.sum(dim=-1)
    best = torch.topk(group_scores, k=kept, dim=-1, sorted=False).indices
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best, True)
    masked = per_group.masked_fill(~allowed.unsqueeze(-1), float("-inf")).view(tokens, experts)
    return torch.topk(masked, k=topk, dim=1).indices
