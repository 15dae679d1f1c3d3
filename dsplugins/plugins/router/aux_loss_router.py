"""The module of `aux_loss`."""

from __future__ import annotations

import torch

from dsplugins.plugins.router.gate import CountingRouter
from dsplugins.plugins.router.selection import group_limited, normalised, scatter


class AuxLossRouter(CountingRouter):
    """Top-k of softmax or sigmoid affinities, balanced by a loss over the micro-batch (arXiv 2101.03961).

    The words of megatron-core hold: softmax means top-k of the logits and a softmax over the chosen
    ones; with `moe_router_pre_softmax`, top-k of the softmax and weights as they are.
    """

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probs [T, E], map bool [T, E]) from logits [S, B, E]; affinities are float32 throughout."""
        flat = logits.float().view(-1, logits.shape[-1])
        probs, routing_map = self.choose(flat)
        coeff = self.config.moe_aux_loss_coeff
        loss = self.batch_loss(self.shares(flat), routing_map, coeff) if coeff and self.recording else None
        return self.recorded(probs.type_as(logits), routing_map, loss), routing_map

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(probs, map) [T, E] from logits [T, E]."""
        config = self.config
        softmax, before = config.moe_router_score_function == "softmax", config.moe_router_pre_softmax
        scores = torch.sigmoid(logits)
        if softmax:
            scores = torch.softmax(logits, dim=-1) if before else logits
        chosen = group_limited(
            scores, config.moe_router_topk, config.moe_router_num_groups, config.moe_router_group_topk
        )
        weights = torch.gather(scores, dim=1, index=chosen)
        if softmax and not before:
            weights = torch.softmax(weights, dim=-1)
        elif not softmax and config.moe_router_topk > 1:
            weights = normalised(weights)
        if config.moe_router_topk_scaling_factor:
            weights = weights * config.moe_router_topk_scaling_factor
        return scatter(chosen, weights, logits.shape[1])

    def shares(self, logits: torch.Tensor) -> torch.Tensor:
        """Affinities [T, E] of each token, adding up to 1."""
        if self.config.moe_router_score_function == "softmax":
            return torch.softmax(logits, dim=-1)
        return normalised(torch.sigmoid(logits))

    def batch_loss(self, shares: torch.Tensor, routing_map: torch.Tensor, coeff: float) -> torch.Tensor:
        """coeff * E / (K T^2) * sum_i count_i * sum_t share_ti, over the micro-batch's T tokens.

        `count` is what each expert really got, groups included; megatron-core counts the plain top-k,
        which is the same where there are no groups.
        """
        tokens, experts = shares.shape
        whole = tokens * self.tp_cp_group.size()
        counts = self.summed_over_sequence(routing_map.sum(dim=0).to(shares.dtype))
        scale = coeff * experts / (self.config.moe_router_topk * whole * whole)
        return scale * (counts * shares.sum(dim=0)).sum()
