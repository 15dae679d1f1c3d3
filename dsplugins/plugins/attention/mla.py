"""Multi-head latent attention, the attention of DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dsplugins.contracts import Plan, Problem, Settings
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import MLATransformerConfig

IGNORED = (
    *("softmax_scale", "kv_channels", "num_query_groups", "add_qkv_bias", "attention_output_gate"),
    *("window_size", "rotary_percent", "mla_down_proj_fusion"),
)
"""Fields of megatron-core's other attentions, and one of its own that this one doesn't do."""


class Mla:
    """Multi-head latent attention (arXiv 2412.19437, section 2.1.1; megatron-core's `MLASelfAttention`).

    Keys and values are made from one latent of `kv_lora_rank` numbers a token, plus one rotary key of
    `qk_pos_emb_head_dim` that all heads share; queries from a latent of `q_lora_rank`, or straight from
    the hidden state where that is null. Both latents go through an RMSNorm.

    Sizes stand in `model:` under Megatron's names. With `rope_type: rope` (what a recipe gets that names
    none: V3's pre-training) this plugin writes `rotary_scaling_factor: 1.0`, since megatron-core multiplies
    the softmax scale by YaRN's mscale squared even then, with a default factor of 40. With `rope_type: yarn`
    (V3's context extension) give `rotary_scaling_factor`, `mscale` and `mscale_all_dim`; V3 has 40, 1 and 1.
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Latent attention on, its norms on, and no YaRN unless asked for."""
        written: dict[str, object] = {
            "model.multi_latent_attention": True,
            "model.qk_layernorm": True,
        }
        if "rope_type" not in plan.model:
            written["model.rope_type"] = "rope"
        if plan.model.get("rope_type", "rope") == "rope":
            written["model.rotary_scaling_factor"] = 1.0
        return written

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Sizes that do not divide, and rotary settings that megatron-core would misread."""
        yield from _rotary_problems(plan.model, settings.model)
        yield from _size_problems(plan, settings.model)
        for field in IGNORED:
            if plan.model.get(field):
                yield Problem(f"model.{field} is ignored by mla", f"model.{field}", "leave it out")

    @hookimpl
    def ds_attention(self, config: MLATransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
        """`LatentAttention` from the backend's linears and norms, the norms named outright."""
        from megatron.core.transformer.enums import AttnMaskType
        from megatron.core.transformer.identity_op import IdentityOp
        from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
        from megatron.core.transformer.spec_utils import ModuleSpec

        from dsplugins.plugins.attention.latent_attention import LatentAttention

        column = backend.column_parallel_linear()
        norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)
        return ModuleSpec(
            module=LatentAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=MLASelfAttentionSubmodules(
                linear_q_proj=column,
                linear_q_down_proj=column,
                linear_q_up_proj=column,
                linear_kv_down_proj=column,
                linear_kv_up_proj=column,
                core_attention=backend.core_attention(),
                linear_proj=backend.row_parallel_linear(),
                q_layernorm=IdentityOp if config.q_lora_rank is None else norm,
                kv_layernorm=norm,
            ),
        )


def _rotary_problems(given: Mapping[str, Any], config: MLATransformerConfig) -> Iterator[Problem]:
    if config.rope_type not in ("rope", "yarn"):
        yield Problem(
            f"model.rope_type={config.rope_type} is not known to megatron-core",
            key="model.rope_type",
            remedy="rope (pre-training) or yarn (context extension)",
        )
    if config.rope_type == "rope" and config.rotary_scaling_factor != 1:
        yield Problem(
            f"model.rotary_scaling_factor={config.rotary_scaling_factor:g} would scale the softmax, not the "
            "positions, with model.rope_type=rope",
            key="model.rotary_scaling_factor",
            remedy="leave it out, or write model.rope_type: yarn",
        )
    if config.rope_type == "yarn" and config.rotary_scaling_factor > 1 and "mscale_all_dim" not in given:
        yield Problem(
            "model.mscale_all_dim is not given: megatron-core's 0.0 leaves the softmax scale alone and "
            "scales the rotary part instead, which is not V3's YaRN",
            key="model.rope_type",
            remedy="write model.mscale_all_dim: 1.0 (V3), the same as model.mscale",
        )
    if config.qk_pos_emb_head_dim % 2:
        yield Problem(
            f"model.qk_pos_emb_head_dim={config.qk_pos_emb_head_dim} is odd, and rotary pairs are two",
            key="model.qk_pos_emb_head_dim",
            remedy="an even number; V3 has 64",
        )


def _size_problems(plan: Plan, config: MLATransformerConfig) -> Iterator[Problem]:
    tensor = plan.layout.tensor
    split = {
        "num_attention_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank or 0,
        "kv_lora_rank + qk_pos_emb_head_dim": config.kv_lora_rank + config.qk_pos_emb_head_dim,
    }
    for name, size in split.items():
        if size % tensor:
            yield Problem(
                f"parallel.tensor={tensor} does not divide model.{name}={size}",
                key="parallel.tensor",
                remedy=f"a divisor of {size}",
            )
