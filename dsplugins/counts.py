"""How many parameters a model has, and how many of them a token uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from dsplugins.model import bare


def parameters(config: Any, chunks: Sequence[torch.nn.Module]) -> tuple[int, int]:
    """(total, activated) trainable parameters of the whole model, MTP included; collective.

    Every parameter is counted once: tensor-parallel shards are added up, copies over data parallel and
    the MTP stage's copy of the embedding are not. Activated: topk / experts of the routed experts.
    """
    local = torch.zeros(2, dtype=torch.float64, device=next(chunks[0].parameters()).device)
    for chunk in map(bare, chunks):
        copy_of_embedding = not chunk.pre_process and getattr(chunk, "embedding", None) is not None
        for name, parameter in chunk.named_parameters():
            if copy_of_embedding and name.startswith("embedding."):
                continue
            routed = ".experts." in name
            local[int(routed)] += parameter.numel() / _copies(parameter, routed)
    torch.distributed.all_reduce(local)
    dense, routed_total = (round(x) for x in local.tolist())
    share = config.moe_router_topk / config.num_moe_experts if config.num_moe_experts else 0
    return dense + routed_total, dense + round(routed_total * share)


def _copies(parameter: torch.Tensor, routed: bool) -> int:
    """Ranks of one pipeline stage that hold the very same values of this parameter."""
    if routed:
        return torch.distributed.get_world_size(parallel_state.get_expert_data_parallel_group())
    copies = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    if not getattr(parameter, "tensor_model_parallel", False):
        copies *= parallel_state.get_tensor_model_parallel_world_size()
    return copies
