"""Multi-head latent attention on megatron-core's own class, with three of its traps closed.

Imported from hook bodies only: it needs torch and megatron-core.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import multi_latent_attention as core
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from megatron.core.utils import get_pg_size

DOWN_PROJECTIONS = ("linear_q_down_proj", "linear_kv_down_proj")


class LatentAttention(core.MLASelfAttention):
    """MLA (arXiv 2412.19437, section 2.1.1): [S, B, H] -> [S, B, H], or [S/TP, B, H] with sequence parallel.

    Differs from `MLASelfAttention` in what it builds and in one gradient, never in the forward result:

    - the gradient of the shared rotary key is summed over the tensor-parallel ranks. Each rank has the
      part of its own heads only, and core cuts that up without adding (Megatron-LM issue 1699);
    - norms and projections are the ones that the spec names. Core's resolver may put its own fused
      class in a projection's place, and asks for a fused one when `q_lora_rank` is None;
    - a subclass of `ColumnParallelLinear` is welcome as a down-projection; core knows three classes
      by identity and raises ValueError for any other.
    """

    def __init__(
        self,
        config: Any,
        submodules: core.MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        **kwargs: Any,
    ) -> None:
        foreign = _foreign_down_projections(submodules)
        stand_ins = replace(submodules, **dict.fromkeys(foreign, ColumnParallelLinear))
        super().__init__(config, stand_ins, layer_number, attn_mask_type=attn_mask_type, **kwargs)
        for slot, module in foreign.items():
            if hasattr(self, slot):
                setattr(self, slot, self._build_down_projection(slot, module, kwargs.get("name")))

    def _build_down_projection(self, slot: str, module: type, name: str | None) -> torch.nn.Module:
        config = self.config
        width = self._latent_width if slot == "linear_kv_down_proj" else config.q_lora_rank
        return build_module(
            module,
            config.hidden_size,
            width,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=slot.removeprefix("linear_"),
            skip_weight_param_allocation=False,
            gather_output=False,
            tp_group=self.pg_collection.tp,
            name=f"{name}.{slot}" if name is not None else None,
        )

    def _resolve_qk_norm_config(self, submodules: core.MLASelfAttentionSubmodules) -> dict[str, Any]:
        compressed = self.config.q_lora_rank is not None
        return {
            "linear_q_proj": IdentityOp if compressed else submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj if compressed else IdentityOp,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm,
            "kv_layernorm": submodules.kv_layernorm,
        }

    @property
    def _latent_width(self) -> int:
        return self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q_compressed, kv_combined = super()._qkv_down_projection(hidden_states)
        if get_pg_size(self.tp_group) == 1:
            return q_compressed, kv_combined
        return q_compressed, self._with_whole_key_gradient(kv_combined)

    def _with_whole_key_gradient(self, kv_combined: torch.Tensor) -> torch.Tensor:
        """Latent and shared key at full width, so that the key's gradient is reduced on its way back.

        In: [S, B, (kv + rope)/TP] of a column-parallel projection, or [S/TP, B, kv + rope] of a duplicated
        one. Out: [S/TP, B, kv + rope] with sequence parallel, where core gathers the key with a
        reduce-scatter as its backward; otherwise [S, B, kv + rope] with an all-reduce behind the key.
        """
        if kv_combined.size(-1) != self._latent_width:
            kv_combined = gather_from_tensor_model_parallel_region(kv_combined, group=self.tp_group)
            if self.config.sequence_parallel:
                return scatter_to_sequence_parallel_region(kv_combined, group=self.tp_group)
        if self.config.sequence_parallel:
            return kv_combined
        latent, key = kv_combined.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat([latent, copy_to_tensor_model_parallel_region(key, group=self.tp_group)], dim=-1)


def _foreign_down_projections(submodules: core.MLASelfAttentionSubmodules) -> dict[str, type]:
    """Down-projections of a class that core does not know by identity."""
    known = (core.Linear, core.TELinear, core.TEColumnParallelLinear, ColumnParallelLinear)
    chosen = {slot: getattr(submodules, slot) for slot in DOWN_PROJECTIONS}
    return {slot: module for slot, module in chosen.items() if module not in known}
