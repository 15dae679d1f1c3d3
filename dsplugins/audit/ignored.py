"""Wishes that megatron-core takes and then ignores without a word: told from the fields alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsplugins.contracts import Settings

LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
BALANCES = (*LOSSES, "sinkhorn", "quantile_balancing", "none")

BY_NAME: Mapping[str, Sequence[str]] = {
    "experts": ("moe_grouped_gemm", "use_grouped_gemm_for_shared_expert", "moe_mlp_glu_interleave_size"),
    "attention": (
        *("experimental_attention_variant", "qk_l2_norm"),
        *("dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_topk_freq"),
        *("dsa_indexer_skip_topk_offset", "dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss"),
        *("dsa_kernel_backend", "dsa_indexer_rope_interleaved", "dsa_indexer_rotate_activation"),
        *("dsa_indexer_scoring_relu", "dsa_indexer_k_norm_epsilon", "dsa_indexer_k_norm_fp32"),
        *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"),
        *("linear_num_key_heads", "linear_num_value_heads"),
        *("mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads"),
        *("mamba_training_ssm_states_dtype", "use_mamba_mem_eff_path"),
    ),
    "backend": (
        *("use_kitchen", "use_kitchen_attention", "kitchen_attention_backend"),
        "use_grouped_gemm_for_dense_mlp",
    ),
    "model": ("heterogeneous_block_specs",),
}
"""Slot -> fields by which core's own spec builders choose a class, or of classes that only they choose; here
the owner of the slot does, and may write them."""

ONLY_ONE_WIDTH = "all weights are drawn with init_method_std"
MUP = f"{ONLY_ONE_WIDTH}, and rates aren't scaled by the width"
NO_GRAPH = "the loop captures no CUDA graph"
ONLY_TRAINS = "the loop only trains"
NOT_THESE_GROUPS = "the loop makes process groups without it"
UNREAD = "megatron-core reads it nowhere"
NOBODY: Mapping[str, Sequence[str]] = {
    UNREAD: (
        *("apply_residual_connection_post_layernorm", "moe_token_dropping", "moe_per_layer_logging"),
        *("moe_deepep_num_sms", "moe_hybridep_num_sms", "mtp_hybrid_override_pattern"),
        *("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"),
        "tp_comm_bootstrap_backend",
    ),
    "the loop clips no queries and keys": ("qk_clip",),
    MUP: ("use_mup", "mup_width_mult", "mup_base_hidden_size", "mup_base_head_dim", "mup_attn_scale_power"),
    NO_GRAPH: (
        *("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl", "cuda_graph_scope"),
        *("cuda_graph_use_single_mempool", "cuda_graph_retain_backward_graph"),
    ),
    ONLY_TRAINS: (
        *("cache_mla_latents", "moe_pad_experts_for_cuda_graph_inference", "inference_rng_tracker"),
        *("inference_sampling_seed", "nccl_all_reduce_for_prefill", "use_inference_optimized_layers"),
        "inference_disable_triton_nvls_kernels",
    ),
    NOT_THESE_GROUPS: (
        *("pipeline_model_parallel_comm_backend", "hierarchical_context_parallel_sizes"),
        *("use_te_rng_tracker", "gtp_weight_remat_size", "expert_gtp_weight_remat_size"),
    ),
    "the loop does not cut sequences over context-parallel ranks": (
        *("hybrid_context_parallel", "max_seqlen_per_dp_cp_rank"),
    ),
}
"""Why -> fields that nothing here acts on, whichever plugins are chosen."""

OF_FP8: Mapping[str, Sequence[str]] = {
    "model": (
        *("fp8_recipe", "fp8_margin", "fp8_interval", "fp8_amax_history_len", "fp8_amax_compute_algo"),
        *("fp8_wgrad", "fp8_output_proj", "fp8_dot_product_attention", "fp8_multi_head_attention"),
        *("tp_only_amax_red", "first_last_layers_bf16", "num_layers_at_start_in_bf16"),
        *("num_layers_at_end_in_bf16", "fp4_recipe"),
    ),
    "ddp": ("fp8_param_gather", "fp4_param_gather", "keep_fp8_transpose_cache"),
    "optimizer": ("fp8_recipe",),
}
"""Section -> what only megatron-core's own FP8 and FP4 read; a plugin's have options."""

Wishes = Iterable[tuple[str, str]]
"""(field of the model's configuration, what is said of it)."""


def ignored(settings: Settings, slots: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(key, what is said of it), on any machine; `slots` is slot -> owner. Needs nothing built."""
    for field, said in _of_model(settings, slots):
        yield f"model.{field}", said
    if not (settings.model.fp8 or settings.model.fp4):
        for section, fields in OF_FP8.items():
            for field, value in _changed(settings, fields, section):
                said = f"{section}.{field}={value} has no effect without megatron-core's own fp8"
                yield f"{section}.{field}", said


def _of_model(settings: Settings, slots: Mapping[str, str]) -> Wishes:
    config = settings.model
    yield from _chosen_by_name(settings, slots)
    yield from _by_nobody(settings)
    yield from _balance(settings)
    yield from _messages(config)
    if config.moe_router_enable_expert_bias:
        field = "moe_router_enable_expert_bias"
        yield field, f"{field} is set: biases would be updated twice"
    if config.recompute_granularity != "selective" and "model.recompute_modules" in settings.writers:
        granularity = f"recompute_granularity={config.recompute_granularity}"
        said = f"recompute_modules={config.recompute_modules} has no effect with {granularity}"
        yield "recompute_modules", said


def _chosen_by_name(settings: Settings, slots: Mapping[str, str]) -> Wishes:
    for slot, fields in BY_NAME.items():
        owner = slots.get(slot)
        for field, value in _changed(settings, fields):
            if settings.writers.get(f"model.{field}") != f"plugin {owner}":
                yield field, f"model.{field}={value} has no effect: {owner} decides in the slot {slot}"


def _changed(settings: Settings, fields: Sequence[str], section: str = "model") -> Iterator[tuple[str, Any]]:
    """Those that somebody wrote and that differ from core's default."""
    config = getattr(settings, section)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for field in fields:
        value = getattr(config, field, None)
        if f"{section}.{field}" in settings.writers and value != defaults.get(field):
            yield field, value


def _by_nobody(settings: Settings) -> Wishes:
    config = settings.model
    for why, fields in NOBODY.items():
        for field, value in _changed(settings, fields):
            yield field, f"model.{field}={value} has no effect: {why}"
    if config.embedding_init_method_std not in (None, config.init_method_std):
        said = f"model.embedding_init_method_std={config.embedding_init_method_std:g} has no effect"
        yield "embedding_init_method_std", f"{said}: {ONLY_ONE_WIDTH}"


def _balance(settings: Settings) -> Wishes:
    """megatron-core takes any word here, and a word it doesn't know balances nothing."""
    config, field = settings.model, "moe_router_load_balancing_type"
    kinds = config.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in set(kinds) - set(BALANCES):
        yield field, f"{field} {kind!r} is unknown: megatron-core would balance nothing"
    if not config.num_moe_experts:
        return
    weight: Any = config.moe_aux_loss_coeff
    weighted = any(weight) if isinstance(weight, list | tuple) else bool(weight)
    if (weighted or "moe_aux_loss_coeff" in settings.scheduled) and not set(kinds) & set(LOSSES):
        yield "moe_aux_loss_coeff", f"moe_aux_loss_coeff={weight} has no effect with {field}={kinds}"
    asked = f"model.{field}" in settings.writers  # core's own default is a loss with the weight 0
    if asked and set(kinds) & set(LOSSES) and "model.moe_aux_loss_coeff" not in settings.writers:
        yield field, f"{field}={kinds} balances nothing: nobody gave moe_aux_loss_coeff"


def _messages(config: Any) -> Wishes:
    """Two messages between the same two ranks in one batch get mixed up, with corrupted gradients."""
    chunks = config.virtual_pipeline_model_parallel_size or 1
    apart = config.overlap_p2p_comm and not config.batch_p2p_comm
    if config.pipeline_model_parallel_size == 2 and chunks > 1 and not apart:
        said = (
            "two stages of several chunks need overlap_p2p_comm=True and batch_p2p_comm=False: "
            "their messages would be mixed up without an error"
        )
        yield "overlap_p2p_comm", said
