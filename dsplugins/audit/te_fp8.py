"""Megatron-core's own FP8: whether TransformerEngine's recipe is the one asked for, and what it reaches."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from dsplugins.audit.layers import Differences, layers

if TYPE_CHECKING:
    from dsplugins.audit.built import Standing

RECIPES = {
    "delayed": "TEDelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
"""`fp8_recipe` of megatron-core -> the class that it makes of it."""
SIXTEEN_BITS = (ColumnParallelLinear, RowParallelLinear)
"""Core's linears without TransformerEngine: its autocast is nothing to them."""


def differences(run: Standing) -> Differences:
    """Where `model.fp8` is set and TransformerEngine is there; without it, `fields` says so."""
    config = run.settings.model
    if not config.fp8 or importlib.util.find_spec("transformer_engine") is None:
        return
    from megatron.core import fp8_utils

    wanted, made = RECIPES.get(config.fp8_recipe), type(fp8_utils.get_fp8_recipe(config)).__name__
    if wanted is not None and made != wanted:
        yield "model", f"fp8_recipe {config.fp8_recipe} is {made}, chosen was {wanted}"
    for name, layer, _ in layers(config, run.chunks):
        if fp8_utils.is_first_last_bf16_layer(config, layer.layer_number - 1):
            continue
        if isinstance(fp8_utils.get_fp8_context(config, layer.layer_number - 1), contextlib.nullcontext):
            yield name, "megatron-core puts no FP8 autocast around it: it multiplies in 16 bits"
        for said in _unreached(layer):
            yield name, said


def _unreached(layer: Any) -> Iterator[str]:
    """Linears and experts that TransformerEngine doesn't multiply."""
    for name, module in layer.named_modules():
        if isinstance(module, SIXTEEN_BITS):
            yield f"{name} is {type(module).__name__}: megatron-core's fp8 does not reach it"
    experts = getattr(layer.mlp, "experts", None)
    if experts is not None and hasattr(experts, "products"):
        yield f"experts {type(experts).__name__} are packed: megatron-core's fp8 does not reach them"
