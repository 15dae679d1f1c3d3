"""The module of `aux_loss`."""

from __future__ import annotations

import torch

from dsplugins.plugins.router.gate import CountingRouter, group_limited, scatter


class AuxLossRouter(CountingRouter):
    """Top-k of softmax or sigmoid affinities, weights renormalised, balance by loss (arXiv 2101.03961)."""

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(probs [T, E], map bool [T, E]) for input [S, B, H]; T = S * B."""
        assert padding_mask is None, "training batches here have no padding"
        logits = self.gating(input)
        logits = logits.view(-1, logits.shape[-1])
        softmax = self.config.moe_router_score_function == "softmax"
        scores = torch.softmax(logits.float(), dim=-1) if softmax else torch.sigmoid(logits.float())
        probs, routing_map = self.choose(scores.type_as(logits))
        self.count(routing_map)
        coeff = self.config.moe_aux_loss_coeff
        if coeff and self.training and torch.is_grad_enabled():
            shares = scores if softmax else scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
            probs = self.attach(probs, self.batch_loss(shares, routing_map, coeff))
        return probs, routing_map

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probs, map) [T, E] from affinities [T, E]."""
        config = self.config
        chosen = group_limited(
            scores, config.moe_router_topk, config.moe_router_num_groups, config.moe_router_group_topk
        )
        weights = torch.gather(scores, dim=1, index=chosen)
        if config.moe_router_topk > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if config.moe_router_topk_scaling_factor:
            weights = weights * config.moe_router_topk_scaling_factor
        return scatter(chosen, weights, scores.shape[1])

    def batch_loss(self, shares: torch.Tensor, routing_map: torch.Tensor, coeff: float) -> torch.Tensor:
        """coeff * E / (K T^2) * sum_i count_i * sum_t share_ti, over the micro-batch's T tokens."""
        tokens, experts = shares.shape
        whole = tokens * self.tp_cp_group.size()
        counts = self.summed_over_sequence(routing_map.sum(dim=0).to(shares.dtype))
        scale = coeff * experts / (self.config.moe_router_topk * whole * whole)
        return scale * (counts * shares.sum(dim=0)).sum()
