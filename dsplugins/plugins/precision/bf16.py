"""BF16 weights and activations over FP32 masters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.contracts import Plan


class Bf16:
    """BF16 weights, activations and messages between stages; the optimizer holds FP32 masters and
    gradients are summed in FP32 (DeepSeek-V3, arXiv 2412.19437, section 3.3.3, without the FP8 part).
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The same answer for the model, the optimizer and the gradient buffers; the host derives
        `params_dtype` and `pipeline_dtype` from `bf16`."""
        return {
            "model.bf16": True,
            "model.fp16": False,
            "optimizer.bf16": True,
            "optimizer.fp16": False,
            "ddp.grad_reduce_in_fp32": True,
        }

    @hookimpl
    def ds_precision(self, config: MLATransformerConfig, backend: BackendSpecProvider) -> BackendSpecProvider:
        """The backend itself: its modules follow `config.params_dtype`."""
        return backend
