"""Wishes that megatron-core takes and then ignores without a word: told from the fields alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsplugins.contracts import Settings

LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
BALANCES = (*LOSSES, "sinkhorn", "quantile_balancing", "none")

BY_NAME: Mapping[str, str] = {
    "moe_grouped_gemm": "experts",
    "experimental_attention_variant": "attention",
    "qk_l2_norm": "attention",
    "use_kitchen": "backend",
    "use_kitchen_attention": "backend",
    "heterogeneous_block_specs": "model",
}
"""Fields by which core's own spec builders choose a class; here the owner of a slot does."""

ONLY_ONE_WIDTH = "all weights are drawn with init_method_std"
NO_GRAPH = "the loop captures no CUDA graph"
UNREAD = "megatron-core reads it nowhere"
NOBODY: Mapping[str, str] = {
    "apply_residual_connection_post_layernorm": UNREAD,
    "moe_token_dropping": UNREAD,
    "qk_clip": "the loop clips no queries and keys",
    "use_mup": f"{ONLY_ONE_WIDTH}, and rates aren't scaled by the width",
    "init_method_xavier_uniform": ONLY_ONE_WIDTH,
    "enable_cuda_graph": NO_GRAPH,
    "external_cuda_graph": NO_GRAPH,
    "cache_mla_latents": "the loop only trains",
    "hybrid_context_parallel": "the loop does not cut sequences over context-parallel ranks",
}
"""Fields that nothing here acts on, whichever plugins are chosen, and why."""

Wishes = Iterable[tuple[str, str]]
"""(field of the model's configuration, what is said of it)."""


def ignored(settings: Settings, slots: Mapping[str, str]) -> Wishes:
    """On any machine; `slots` is slot -> owner. Needs nothing built."""
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
    for field, slot in BY_NAME.items():
        owner, value = slots.get(slot), getattr(settings.model, field)
        if value and settings.writers.get(f"model.{field}") != f"plugin {owner}":
            yield field, f"model.{field}={value} has no effect: {owner} decides in the slot {slot}"


def _by_nobody(settings: Settings) -> Wishes:
    config = settings.model
    for field, why in NOBODY.items():
        if value := getattr(config, field, None):
            yield field, f"model.{field}={value} has no effect: {why}"
    if config.cuda_graph_impl != "none":
        yield "cuda_graph_impl", f"model.cuda_graph_impl={config.cuda_graph_impl} has no effect: {NO_GRAPH}"
    if config.embedding_init_method_std not in (None, config.init_method_std):
        said = f"model.embedding_init_method_std={config.embedding_init_method_std:g} has no effect"
        yield "embedding_init_method_std", f"{said}: {ONLY_ONE_WIDTH}"
    if config.first_last_layers_bf16 and not (config.fp8 or config.fp4):
        said = "model.first_last_layers_bf16=True has no effect without megatron-core's own fp8"
        yield "first_last_layers_bf16", said


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
