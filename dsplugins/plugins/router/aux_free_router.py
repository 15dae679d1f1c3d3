"""The module of `aux_free`."""

from __future__ import annotations

from typing import Any

import torch

from dsplugins.plugins.router.gate import CountingRouter, group_limited, scatter


class AuxFreeRouter(CountingRouter):
    """Sigmoid gate whose selection is biased and whose weights are not (report, 2.1.2, eq. 12-16).

    Buffer `expert_bias` float32 [E], saved: starts at 0, moves by `moe_router_bias_update_rate` a step.
    """

    def __init__(self, config: Any, pg_collection: Any = None, is_mtp_layer: bool = False) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        bias = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=self.weight.device)
        self.register_buffer("expert_bias", bias, persistent=True)

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(probs [T, E], map bool [T, E]) for input [S, B, H]; T = S * B."""
        assert padding_mask is None, "training batches here have no padding"
        logits = self.gating(input)
        length, batch, experts = logits.shape
        scores = torch.sigmoid(logits.view(-1, experts).float()).type_as(logits)
        probs, routing_map = self.choose(scores)
        self.count(routing_map)
        alpha = self.config.moe_aux_loss_coeff
        if alpha and self.training and torch.is_grad_enabled():
            probs = self.attach(probs, self.sequence_loss(scores.view(length, batch, experts), alpha))
        return probs, routing_map

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probs, map) [T, E] from affinities [T, E]: bias to select, none in the weights."""
        config = self.config
        chosen = group_limited(
            scores + self.expert_bias,
            config.moe_router_topk,
            config.moe_router_num_groups,
            config.moe_router_group_topk,
        )
        weights = torch.gather(scores, dim=1, index=chosen).type_as(scores)
        if config.moe_router_topk > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if config.moe_router_topk_scaling_factor:
            weights = weights * config.moe_router_topk_scaling_factor
        return scatter(chosen, weights, scores.shape[1])

    def sequence_loss(self, scores: torch.Tensor, alpha: float) -> torch.Tensor:
        """alpha * sum_i f_i P_i, mean over the sequences of the micro-batch (report, eq. 17-20).

        scores: [S, B, E], of this rank's part of the sequences. f counts the plain top-k of the
        affinities, without bias or groups, over whole sequences; P is this rank's part of the mean, so
        that the ranks' losses add up.
        """
        length, _, experts = scores.shape
        topk = self.config.moe_router_topk
        with torch.no_grad():
            chosen = torch.topk(scores, k=topk, dim=-1).indices
            counts = torch.zeros_like(scores).scatter(-1, chosen, 1.0).sum(dim=0)
            counts = self.summed_over_sequence(counts)
        whole = length * self.tp_cp_group.size()
        shares = (scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)).sum(dim=0)
        return alpha * (counts * shares).sum(dim=-1).mean() * experts / (topk * whole * whole)

    @torch.no_grad()
    def update_bias(self, tokens_per_expert: torch.Tensor) -> None:
        """b_i += gamma * sign(mean(c) - c_i); counts [E] of the whole step (arXiv 2408.15664, Alg. 1)."""
        error = tokens_per_expert.mean() - tokens_per_expert
        self.expert_bias += self.config.moe_router_bias_update_rate * torch.sign(error)
