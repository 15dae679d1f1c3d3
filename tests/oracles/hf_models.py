"""transformers' DeepseekV3 in the sizes of oracle O1, with weights that make every part matter."""

from __future__ import annotations

from typing import Any

import torch

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""V3's context extension (facts 1.1, the published config.json)."""

PLAIN: dict[str, Any] = {"rope_type": "default"}
"""V3's pre-training: no scaling."""


def hf_model(q_lora: int | None, rope: dict[str, Any], bias: float = 0.0) -> torch.nn.Module:
    """DeepseekV3ForCausalLM; `bias` is the mean of the correction biases."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        q_lora_rank=q_lora,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        routed_scaling_factor=2.5,
        rope_parameters={"rope_theta": 10000.0} | rope,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    scatter(model, bias=bias)
    return model


def scatter(model: torch.nn.Module, seed: int = 7, bias: float = 0.0) -> None:
    """Weights N(0, .08), gate N(0, .3), correction bias N(`bias`, .05), norms 1 +- .1."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in state.items():
            if name.endswith("inv_freq"):
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                value.copy_(1 + 0.1 * noise)
            elif "e_score_correction_bias" in name:
                value.copy_(bias + 0.05 * noise)
            else:
                value.copy_((0.3 if name.endswith("mlp.gate.weight") else 0.08) * noise)
