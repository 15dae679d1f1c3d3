"""FP32 everywhere: the reference that other number formats are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.contracts import Plan


class Fp32:
    """FP32 weights, activations, gradients and messages: parallel layouts agree to 1e-6 and better."""

    contract = ">=1.0,<2"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The same answer for the model and the optimizer; the host derives `params_dtype`
        and `pipeline_dtype` from `bf16`. Gradients are FP32 as they come."""
        return {
            "model.bf16": False,
            "model.fp16": False,
            "optimizer.bf16": False,
            "optimizer.fp16": False,
        }

    @hookimpl
    def ds_precision(self, config: MLATransformerConfig, backend: BackendSpecProvider) -> BackendSpecProvider:
        """The backend itself: its modules follow `config.params_dtype`."""
        return backend
