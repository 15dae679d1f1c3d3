"""Which experts a token goes to: top-k among the best groups."""

from __future__ import annotations

import torch


def group_limited(scores: torch.Tensor, topk: int, groups: int | None, kept: int | None) -> torch.Tensor:
    """Indices int64 [T, K] of the top experts among the best groups (report, 2.1.2, node-limited routing).

    scores: [T, E]. A group's score is the sum of its K / `kept` highest ones (V3: 8 / 4 = 2); only
    experts of the `kept` best groups can be chosen. No groups: plain top-k.
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


def normalised(scores: torch.Tensor) -> torch.Tensor:
    """Scores [..., N] over their sum; the summand keeps an all-zero row from becoming NaN."""
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def scatter(chosen: torch.Tensor, weights: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights [T, K] as dense (probs, map bool) [T, E]."""
    shape = (chosen.shape[0], experts)
    probs = torch.zeros(shape, dtype=weights.dtype, device=weights.device).scatter(1, chosen, weights)
    routing_map = torch.zeros(shape, dtype=torch.bool, device=weights.device).scatter(1, chosen, True)
    return probs, routing_map
