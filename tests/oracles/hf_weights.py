"""Names of transformers' DeepseekV3 in memory -> names of megatron-core's GPTModel on one rank.

Pure functions over dictionaries. The mapping is linear, so it takes gradients as well as weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

Tensors = Mapping[str, torch.Tensor]

WHOLE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}

LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.q_proj.weight": "self_attention.linear_q_proj.weight",
    "self_attn.q_a_proj.weight": "self_attention.linear_q_down_proj.weight",
    "self_attn.q_a_layernorm.weight": "self_attention.q_layernorm.weight",
    "self_attn.q_b_proj.weight": "self_attention.linear_q_up_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "self_attention.linear_kv_down_proj.weight",
    "self_attn.kv_a_layernorm.weight": "self_attention.kv_layernorm.weight",
    "self_attn.kv_b_proj.weight": "self_attention.linear_kv_up_proj.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp.gate.weight": "mlp.router.weight",
    "mlp.gate.e_score_correction_bias": "mlp.router.expert_bias",
}
"""The latent attention needs no reordering: [latent, rotary key] and [no position, rotary] are core's too."""

MTP = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "post_norm.weight": "final_layernorm.weight",
}


def megatron_names(hf: Tensors) -> dict[str, torch.Tensor]:
    """Weights (or gradients) of a `DeepseekV3ForCausalLM` under megatron's names."""
    named = {new: hf[old] for old, new in WHOLE.items() if old in hf}
    for i in _numbers(hf, "model.layers."):
        layer = dict(_layer(_under(hf, f"model.layers.{i}.")))
        named |= {f"decoder.layers.{i}.{name}": value for name, value in layer.items()}
    return named


def megatron_mtp_names(hf: Tensors) -> dict[str, torch.Tensor]:
    """Weights (or gradients) of the `layers` of an `MtpModel` under megatron's names."""
    named = {}
    for i in _numbers(hf, "layers."):
        module = _under(hf, f"layers.{i}.")
        named |= {f"mtp.layers.{i}.{new}": module[old] for old, new in MTP.items()}
        layer = dict(_layer(_under(module, "mtp_block.")))
        named |= {f"mtp.layers.{i}.mtp_model_layer.{name}": value for name, value in layer.items()}
    return named


def _layer(hf: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((new, hf[old]) for old, new in LAYER.items() if old in hf)
    for mlp in ("mlp", "mlp.shared_experts"):
        if f"{mlp}.gate_proj.weight" in hf:
            gate, up = hf[f"{mlp}.gate_proj.weight"], hf[f"{mlp}.up_proj.weight"]
            yield f"{mlp}.linear_fc1.weight", torch.cat([gate, up])
            yield f"{mlp}.linear_fc2.weight", hf[f"{mlp}.down_proj.weight"]
    if "mlp.experts.gate_up_proj" in hf:  # [E, 2I, H], gate first, and [E, H, I]
        yield "mlp.experts.weight1", hf["mlp.experts.gate_up_proj"]
        yield "mlp.experts.weight2", hf["mlp.experts.down_proj"]


def one_by_one(named: Tensors) -> dict[str, torch.Tensor]:
    """The packed experts of `grouped` under the names of `sequential`."""
    apart = {}
    for name, value in named.items():
        layer = {"weight1": "linear_fc1", "weight2": "linear_fc2"}.get(name.rpartition(".")[2])
        if layer is None:
            apart[name] = value
            continue
        prefix = name.rpartition(".")[0]
        apart |= {f"{prefix}.local_experts.{e}.{layer}.weight": each for e, each in enumerate(value)}
    return apart


def _under(tensors: Tensors, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _numbers(tensors: Tensors, prefix: str) -> list[int]:
    return sorted({int(name.split(".")[0]) for name in _under(tensors, prefix)})
