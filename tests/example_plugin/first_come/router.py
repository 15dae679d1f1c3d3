"""The router's own mathematics, on megatron-core's Router."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import Router


class FirstComeRouter(Router):
    """Softmax of logits over a temperature; weights are the chosen experts' shares, not renormalised."""

    def __init__(self, config, pg_collection=None, is_mtp_layer=False, temperature=1.0):
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.temperature = temperature
        counts = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=self.weight.device)
        self.register_buffer("local_tokens_per_expert", counts, persistent=False)

    def routing(self, logits):
        """(probs [T, E], map bool [T, E])."""
        shares = torch.softmax(logits.view(-1, logits.shape[-1]) / self.temperature, dim=-1)
        chosen = shares.topk(self.config.moe_router_topk, dim=-1).indices
        routing_map = torch.zeros_like(shares, dtype=torch.bool).scatter(1, chosen, True)
        return shares * routing_map, routing_map

    def forward(self, input, padding_mask=None):
        """For input [S, B, H]."""
        logits = router_gating_linear(input, self.weight, self.bias, torch.float32)
        probs, routing_map = self.routing(logits)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += routing_map.sum(dim=0).float()
        return probs, routing_map
