"""Norms on the fused kernels of NVIDIA's apex. Importing it needs apex."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex.normalization import FusedLayerNorm, FusedRMSNorm

from dsplugins.plugins.backend.norm import mark, refuse_what_torch_lacks

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class ApexRMSNorm(FusedRMSNorm):
    """`norm.RMSNorm` in one kernel each way."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        refuse_what_torch_lacks(config)
        super().__init__(hidden_size, eps=eps)
        self.to(config.params_dtype)
        mark(self.weight, config)


class ApexLayerNorm(FusedLayerNorm):
    """`norm.LayerNorm` in one kernel each way."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        refuse_what_torch_lacks(config)
        super().__init__(hidden_size, eps=eps)
        self.to(config.params_dtype)
        mark(self.weight, config)
        mark(self.bias, config)


class ApexNorm:
    """Makes the norm that `config.normalization` names; see `norm.Norm`."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> ApexRMSNorm | ApexLayerNorm:
        if config.normalization == "RMSNorm":
            return ApexRMSNorm(config, hidden_size, eps)
        return ApexLayerNorm(config, hidden_size, eps)


__all__ = ["ApexLayerNorm", "ApexNorm", "ApexRMSNorm"]
