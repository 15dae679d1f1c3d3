"""A DeepSeek-V3 of a few thousand parameters, built from the plugins' own hooks, without the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from dsplugins.plugins.backend.torch_local import TorchLocal
from dsplugins.plugins.model.gpt import Gpt, GptOptions

VOCABULARY = 160
SEQUENCE = 16

SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_moe_experts": 16,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_layer_freq": [0, 1, 1],
    "moe_router_topk": 4,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 16,
}
"""Sizes of oracle O1: one dense layer, two with 16 experts in 4 groups, of which 4 and 2 are chosen."""

MANNERS: dict[str, Any] = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "rope_type": "rope",
    "rotary_scaling_factor": 1.0,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "none",
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall",
    "params_dtype": torch.float32,
    "use_cpu_initialization": True,
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
}
"""What the platform, the attention and the router would write into a run's configuration."""


def tiny_config(**changes: Any) -> MLATransformerConfig:
    """O1's configuration with megatron-core field names; TP turns sequence parallel on."""
    fields = SIZES | MANNERS | changes
    fields.setdefault("sequence_parallel", fields.get("tensor_model_parallel_size", 1) > 1)
    return MLATransformerConfig(**fields)


def tiny_decoder(config: MLATransformerConfig, attention: Any) -> TransformerBlockSubmodules:
    """Spec of the whole decoder: the attention plugin's, and core's own MLP, router and experts."""
    backend = TorchLocal().ds_backend(config)
    norm = backend.layer_norm(rms_norm=True, for_qk=False)

    def layer(experts: int) -> ModuleSpec:
        mlp = get_mlp_module_spec_for_backend(
            backend=backend, num_experts=config.num_moe_experts if experts else None
        )
        submodules = TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention.ds_attention(config, backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        )
        return ModuleSpec(module=TransformerLayer, submodules=submodules)

    layers = [layer(experts) for experts in config.moe_layer_freq]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def build_tiny(config: MLATransformerConfig, attention: Any, mtp: Any = None) -> torch.nn.Module:
    """This pipeline stage's chunk, weights as drawn."""
    decoder = tiny_decoder(config, attention)
    block = mtp and mtp.ds_mtp(config, decoder, TorchLocal().ds_backend(config))
    first = get_transformer_layer_offset(config)
    mine = decoder.layer_specs[first : first + get_num_layers_to_build(config)]
    plan: Any = SimpleNamespace(data=SimpleNamespace(seq_length=SEQUENCE))
    settings: Any = SimpleNamespace(model=config, vocab_size=VOCABULARY)
    factory = Gpt(GptOptions(dense_layers=1)).ds_model(plan, settings)
    return factory(
        decoder=TransformerBlockSubmodules(layer_specs=mine, layer_norm=decoder.layer_norm),
        mtp=block,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        vp_stage=None,
    )


def tokens(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions, both int64 [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (batch, SEQUENCE), generator=generator)
    return ids, torch.arange(SEQUENCE).expand(batch, SEQUENCE)
