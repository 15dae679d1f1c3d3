"""Grouped-query attention: what DeepSeek-V3 is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dsplugins.contracts import Plan, Problem, Settings
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import MLATransformerConfig


class Gqa:
    """Grouped-query attention with rotary positions (arXiv 2305.13245; megatron-core's `SelfAttention`).

    `model.num_attention_heads` heads of `model.kv_channels` share `model.num_query_groups` keys and values;
    as many groups as heads is ordinary multi-head attention. All of a head is rotated, with
    `model.rotary_base` and `model.rotary_percent`; the sizes of latent attention are not used.
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Latent attention off."""
        return {"model.multi_latent_attention": False}

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Groups and heads that do not divide, and scaling that would be ignored."""
        heads, groups = settings.model.num_attention_heads, settings.model.num_query_groups
        tensor = plan.layout.tensor
        if heads % groups:
            yield Problem(
                f"model.num_query_groups={groups} does not divide model.num_attention_heads={heads}",
                key="model.num_query_groups",
                remedy=f"a divisor of {heads}",
            )
        for name, size in (("num_attention_heads", heads), ("num_query_groups", groups)):
            if size % tensor:
                yield Problem(
                    f"parallel.tensor={tensor} does not divide model.{name}={size}",
                    key="parallel.tensor",
                    remedy=f"a divisor of {size}",
                )
        if plan.model.get("rope_type", "rope") != "rope":
            yield Problem(
                f"model.rope_type={plan.model['rope_type']} is ignored by gqa, which rotates without scaling",
                key="model.rope_type",
                remedy="leave it out, or choose the attention plugin mla",
            )

    @hookimpl
    def ds_attention(self, config: MLATransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
        """Core's `SelfAttention` from the backend's linears and norms."""
        from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
        from megatron.core.transformer.enums import AttnMaskType
        from megatron.core.transformer.identity_op import IdentityOp
        from megatron.core.transformer.spec_utils import ModuleSpec

        norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)
        qk_norm = norm if config.qk_layernorm else IdentityOp
        return ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=backend.column_parallel_linear(),
                core_attention=backend.core_attention(),
                linear_proj=backend.row_parallel_linear(),
                q_layernorm=qk_norm,
                k_layernorm=qk_norm,
            ),
        )
