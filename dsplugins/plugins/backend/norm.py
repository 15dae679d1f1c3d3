"""Norms of the local backend: torch's own kernels, usable with sequence parallelism.

megatron-core's `WrappedTorchNorm` refuses sequence parallelism, and without it core refuses MoE with
tensor parallelism. All that is missing is a mark on the weight: with the sequence split over the
tensor-parallel ranks each rank sees a part of the weight's gradient, and core's
`finalize_model_grads` sums marked ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in fp32 inside, x's dtype outside."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        refuse_what_torch_lacks(config)
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark(self.weight, config)


class LayerNorm(torch.nn.LayerNorm):
    """Layer norm with bias over the last dimension, in fp32 inside, x's dtype outside."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        refuse_what_torch_lacks(config)
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark(self.weight, config)
        mark(self.bias, config)


class Norm:
    """Makes the norm that `config.normalization` names, as core's own `TENorm` does.

    Core asks a backend for the norms of MTP and of the final layer without saying which kind, so the
    kind has to come from the config. Raises ValueError for any but RMSNorm and LayerNorm.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> RMSNorm | LayerNorm:
        if config.normalization == "RMSNorm":
            return RMSNorm(config, hidden_size, eps)
        if config.normalization == "LayerNorm":
            return LayerNorm(config, hidden_size, eps)
        raise ValueError(f"model.normalization={config.normalization}: torch_local has RMSNorm and LayerNorm")


def refuse_what_torch_lacks(config: TransformerConfig) -> None:
    """Raise ValueError for fields that neither torch's norms nor apex's have."""
    for name in ("layernorm_zero_centered_gamma", "persist_layer_norm", "memory_efficient_layer_norm"):
        if getattr(config, name):
            raise ValueError(f"model.{name} needs another backend than torch_local")


def mark(parameter: torch.nn.Parameter, config: TransformerConfig) -> None:
    """Tell core whether to sum the gradient of `parameter` over the tensor-parallel ranks."""
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


__all__ = ["LayerNorm", "Norm", "RMSNorm"]
