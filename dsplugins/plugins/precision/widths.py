"""Widths of the matrices that one rank multiplies, for formats whose kernels want multiples of something."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.contracts import Plan


def widths(config: MLATransformerConfig, plan: Plan) -> dict[str, int]:
    """Inputs and outputs of a rank's linears, by what they are made of."""
    tensor, experts = plan.layout.tensor, plan.layout.expert_tensor
    found: dict[str, int] = {
        "model.hidden_size": config.hidden_size,
        "a rank's model.ffn_hidden_size": config.ffn_hidden_size // tensor,
    }
    if config.num_moe_experts:
        found["a rank's model.moe_ffn_hidden_size"] = config.moe_ffn_hidden_size // experts
        if shared := config.moe_shared_expert_intermediate_size:
            found["a rank's model.moe_shared_expert_intermediate_size"] = shared // tensor
    heads = config.num_attention_heads // tensor
    if plan.slots.get("attention") == "mla":
        return found | _latent(config, heads)
    return found | _grouped_query(config, heads, (config.num_query_groups or 0) // tensor)


def _grouped_query(config: MLATransformerConfig, heads: int, groups: int) -> dict[str, int]:
    """Those of ordinary attention; `heads` and `groups` of keys and values of a rank."""
    size = config.kv_channels or 0
    return {
        "a rank's heads x model.kv_channels": heads * size,
        "a rank's (heads + 2 x groups) x model.kv_channels": (heads + 2 * groups) * size,
    }


def _latent(config: MLATransformerConfig, heads: int) -> dict[str, int]:
    """Those of MLA; `heads` of a rank."""
    rope = config.qk_pos_emb_head_dim
    found = {
        "model.kv_lora_rank": config.kv_lora_rank,
        "model.kv_lora_rank + model.qk_pos_emb_head_dim": config.kv_lora_rank + rope,
        "a rank's heads x (model.qk_head_dim + model.qk_pos_emb_head_dim)": heads
        * (config.qk_head_dim + rope),
        "a rank's heads x model.v_head_dim": heads * config.v_head_dim,
    }
    return found | ({"model.q_lora_rank": config.q_lora_rank} if config.q_lora_rank else {})


def uneven(config: MLATransformerConfig, plan: Plan, multiple: int) -> Iterable[str]:
    """`NAME is WIDTH` of each that is no multiple."""
    return (f"{name} is {width}" for name, width in widths(config, plan).items() if width % multiple)
