"""The module of `aux_free`."""

from __future__ import annotations

from typing import Any

import torch

from dsplugins.plugins.router.gate import CountingRouter
from dsplugins.plugins.router.selection import group_limited, normalised, scatter


class AuxFreeRouter(CountingRouter):
    """Sigmoid gate whose selection is biased and whose weights are not (report, 2.1.2, eq. 12-16).

    Buffer `expert_bias` float32 [E], saved: starts at 0, moves by `moe_router_bias_update_rate` a step.
    """

    def __init__(self, config: Any, pg_collection: Any = None, is_mtp_layer: bool = False) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self._buffer("expert_bias", (config.num_moe_experts,), persistent=True)

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probs [T, E], map bool [T, E]) from logits [S, B, E]; affinities are float32 throughout."""
        scores = torch.sigmoid(logits.float())
        probs, routing_map = self.choose(scores.view(-1, scores.shape[-1]))
        alpha = self.config.moe_aux_loss_coeff
        loss = None
        if alpha and self.recording:
            # Affinities of its own, as in megatron-core: gradients are summed in the same order, bit for bit.
            loss = self.sequence_loss(torch.sigmoid(logits.float()), alpha)
        return self.recorded(probs.type_as(logits), routing_map, loss), routing_map

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probs, map) [T, E] from affinities [T, E]: bias to select, none in the weights."""
        config = self.config
        chosen = group_limited(
            scores + self.expert_bias,
            config.moe_router_topk,
            config.moe_router_num_groups,
            config.moe_router_group_topk,
        )
        weights = torch.gather(scores, dim=1, index=chosen)
        if config.moe_router_topk > 1:
            weights = normalised(weights)
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
        shares = normalised(scores).sum(dim=0)
        # In megatron-core's order of operations, so that both round alike.
        return torch.sum(shares * counts) * (experts * alpha / (topk * whole * whole)) / scores.shape[1]

    @torch.no_grad()
    def update_bias(self, tokens_per_expert: torch.Tensor) -> None:
        """b_i += gamma * sign(mean(c) - c_i); counts [E] of the whole step (arXiv 2408.15664, Alg. 1).

        The mean is taken in float64: a step of V3 sends 5e8 tokens to a layer's experts, and float32
        counts to 1.7e7, so an expert that stands exactly at the mean would be pushed all the same.
        """
        counts = tokens_per_expert.double()
        self.expert_bias += (
            torch.sign(counts.mean() - counts).float() * self.config.moe_router_bias_update_rate
        )
