"""Experts in two grouped matrix products, on CPU and CUDA."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from dsplugins.contracts import ExpertsFactory, Plan, Problem, Settings
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig

UNSERVED = (
    "fp8",
    "fp4",
    "moe_latent_size",
    "moe_apply_probs_on_input",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "use_te_activation_func",
    "delay_wgrad_compute",
)
"""Fields that megatron-core's own experts obey and these don't."""


class Grouped:
    """All local experts at once through `torch.nn.functional.grouped_mm`, in BF16 on a CPU in few shapes.

    Same arithmetic and same checkpoint keys as `sequential`; weights are packed, [E, 2I, H] and
    [E, H, I]. A number format reaches them by bringing `grouped_products()`; the backend's linears are not
    used, so with one that only wraps those, use `sequential`.
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """What the packed experts don't do."""
        config = settings.model
        if not config.num_moe_experts:
            return []
        return [*_layout(plan), *_fields(config), *_strides(config)]

    @hookimpl
    def ds_experts(self, config: MLATransformerConfig, backend: BackendSpecProvider) -> ExpertsFactory:
        """GroupedExperts, on the products of the number format where it brings some."""
        from dsplugins.plugins.experts.grouped_experts import GroupedExperts, TorchProducts

        brought = getattr(backend, "grouped_products", None)
        return partial(GroupedExperts, products=brought or partial(TorchProducts, config))


def _layout(plan: Plan) -> Iterable[Problem]:
    if plan.layout.expert_tensor > 1:
        said = f"parallel.expert_tensor={plan.layout.expert_tensor}: grouped experts are whole on a rank"
        yield Problem(said, "parallel.expert_tensor", "set it to 1, or name sequential instead of grouped")


def _fields(config: Any) -> Iterable[Problem]:
    if not config.gated_linear_unit or config.add_bias_linear:
        said = "grouped experts are gated and without biases"
        remedy = "model.gated_linear_unit: true and model.add_bias_linear: false, or name sequential"
        yield Problem(said, "plugins.grouped", remedy)
    for field in UNSERVED:
        value = getattr(config, field)
        if value:
            said = f"model.{field}={value} would not reach grouped experts"
            yield Problem(said, f"model.{field}", "leave it out, or name sequential instead of grouped")


def _strides(config: Any) -> Iterable[Problem]:
    """CUDA's grouped product wants rows that start at multiples of 16 bytes."""
    unit = 16 // config.params_dtype.itemsize
    for field in ("hidden_size", "moe_ffn_hidden_size"):
        value = getattr(config, field)
        if value % unit:
            said = (
                f"model.{field}={value} is not a multiple of {unit}: grouped products need rows of 16 bytes"
            )
            yield Problem(said, f"model.{field}", f"use a multiple of {unit}, or name sequential")
