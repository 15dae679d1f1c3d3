"""megatron-core's configuration: what it holds against what was asked, and wishes that it ignores."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dsplugins.schedules import Schedule
from dsplugins.settings import SECTIONS, ledger

if TYPE_CHECKING:
    from dsplugins.audit.built import Standing
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


def differences(run: Standing) -> Iterable[str]:
    """Fields that were changed or have no effect, and formats without the library behind them."""
    yield from _held(run)
    yield from ignored(run.settings, run.plan.slots)
    yield from _formats(run.settings.model)


def ignored(settings: Settings, slots: Mapping[str, str]) -> Iterable[str]:
    """Wishes without effect, or of corrupting effect, on any machine; `slots` is slot -> owner."""
    config = settings.model
    yield from _chosen_by_name(settings, slots)
    yield from _balance(settings)
    yield from _messages(config)
    if config.moe_router_enable_expert_bias:
        yield "moe_router_enable_expert_bias is set: biases would be updated twice"
    if config.recompute_granularity != "selective" and "model.recompute_modules" in settings.writers:
        yield (
            f"recompute_modules={config.recompute_modules} has no effect with "
            f"recompute_granularity={config.recompute_granularity}"
        )


def _held(run: Standing) -> Iterable[str]:
    """Values that megatron-core's own checks replaced; those under a schedule move in each step."""
    for key, asked in ledger(run.plan, run.plugins).values.items():
        section, field = key.split(".", 1)
        if section not in SECTIONS or isinstance(asked, str) or key == "model.vocab_size":
            continue  # words may stand for objects: an activation, a layout
        if isinstance(asked, Schedule):
            if not asked.is_constant:
                continue
            asked = asked.at(0, 0)
        held = getattr(getattr(run.settings, section), field)
        if _plain(held) != _plain(asked):
            yield f"{key} was to be {asked!r}, megatron-core holds {held!r}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _chosen_by_name(settings: Settings, slots: Mapping[str, str]) -> Iterable[str]:
    for field, slot in BY_NAME.items():
        writer = settings.writers.get(f"model.{field}")
        value = getattr(settings.model, field)
        if value and writer != f"plugin {slots.get(slot)}":
            yield f"model.{field}={value} has no effect: {slots.get(slot)} decides in the slot {slot}"


def _balance(settings: Settings) -> Iterable[str]:
    """megatron-core takes any word here, and a word it doesn't know balances nothing."""
    config = settings.model
    kinds = config.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in kinds:
        if kind not in BALANCES:
            yield f"moe_router_load_balancing_type {kind!r} is unknown: megatron-core would balance nothing"
    if not config.num_moe_experts:
        return
    weight, written = config.moe_aux_loss_coeff, "model.moe_aux_loss_coeff" in settings.writers
    weights = weight if isinstance(weight, list | tuple) else [weight]
    scheduled = "moe_aux_loss_coeff" in settings.scheduled
    if (any(weights) or scheduled) and not set(kinds) & set(LOSSES):
        yield f"moe_aux_loss_coeff={weight} has no effect with moe_router_load_balancing_type={kinds}"
    if set(kinds) & set(LOSSES) and not written:
        yield f"moe_router_load_balancing_type={kinds} balances nothing: nobody gave moe_aux_loss_coeff"


def _formats(config: Any) -> Iterable[str]:
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    for field in ("fp8", "fp4", "quant_recipe"):
        if getattr(config, field):
            yield f"{field} is set, transformer-engine is absent: megatron-core would train in 16 bits"


def _messages(config: Any) -> Iterable[str]:
    """Two messages between the same two ranks in one batch get mixed up, with corrupted gradients."""
    chunks = config.virtual_pipeline_model_parallel_size or 1
    apart = config.overlap_p2p_comm and not config.batch_p2p_comm
    if config.pipeline_model_parallel_size == 2 and chunks > 1 and not apart:
        yield (
            "two stages of several chunks need overlap_p2p_comm=True and batch_p2p_comm=False: "
            "their messages would be mixed up without an error"
        )
