"""Core attention over `torch.nn.functional.scaled_dot_product_attention`, on the CPU over `causal_blocks`.

megatron-core's `DotProductAttention` takes no separate head size for values, so MLA can't be built
on it; this one serves MLA and grouped-query attention.

Shape legend: S sequence, B micro-batch, N heads of this rank, G query groups of this rank, D head
size of queries and keys, V head size of values.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsplugins.plugins.backend import causal_blocks

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class SdpaCoreAttention(MegatronModule):
    """Causal softmax(q k^T * scale) v without dropout.

    megatron-core instantiates this slot twice per MLA layer, with and without `k_channels` and
    `v_channels`, and drops the first one: sizes are therefore read from the tensors. Raises
    ValueError for settings that this attention would otherwise ignore.
    """

    kernels: ClassVar[SDPBackend | None] = None
    """Whose kernels on a GPU; None: those that torch chooses."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if wishes := unmet(config, dropout):
            raise ValueError("; ".join(wishes.values()))
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        **extra: Any,
    ) -> torch.Tensor:
        """Query [S, B, N, D], key [S, B, G, D], value [S, B, G, V] -> [S, B, N * V].

        Raises ValueError for a mask tensor, a mask type other than causal, a bias, packed sequences,
        or different lengths of queries and keys.
        """
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if kind is not AttnMaskType.causal or attention_mask is not None:
            raise ValueError(f"attention of torch_local is causal and takes no mask tensor, got {kind}")
        if attention_bias is not None or packed_seq_params is not None or extra:
            raise ValueError(f"attention of torch_local has no bias and no packed sequences {sorted(extra)}")
        if query.shape[0] != key.shape[0]:
            raise ValueError(f"{query.shape[0]} queries but {key.shape[0]} keys: training only")
        scale = query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        given = self.kernels if query.is_cuda else None
        with contextlib.nullcontext() if given is None else sdpa_kernel(given):
            return _attend(query, key, value, scale)


class CudnnCoreAttention(SdpaCoreAttention):
    """By cuDNN on a GPU. Raises RuntimeError where cuDNN has no kernel for the tensors it is given."""

    kernels = SDPBackend.CUDNN_ATTENTION


def unmet(config: TransformerConfig, dropout: float | None = None) -> dict[str, str]:
    """What `config` asks for and this attention lacks: recipe key -> message."""
    dropout = config.attention_dropout if dropout is None else dropout
    rules = {
        "model.attention_dropout": (dropout == 0.0, "0.0"),
        "parallel.context": (config.context_parallel_size == 1, "1"),
        "model.window_size": (config.window_size is None, "null"),
        "model.softmax_type": (config.softmax_type == "vanilla", "vanilla"),
        "model.apply_query_key_layer_scaling": (not config.apply_query_key_layer_scaling, "false"),
    }
    return {key: f"{key} must be {want} with torch_local" for key, (met, want) in rules.items() if not met}


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """As `SdpaCoreAttention.forward`, without the checks."""
    heads, groups = query.shape[2], key.shape[2]
    if query.device.type == "cpu":
        if groups != heads:
            key, value = (t.repeat_interleave(heads // groups, dim=2) for t in (key, value))
        return causal_blocks.attend(query, key, value, scale)
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        is_causal=True,
        scale=scale,
        enable_gqa=groups != heads,
    )
    return out.permute(2, 0, 1, 3).flatten(2)


__all__ = ["CudnnCoreAttention", "SdpaCoreAttention", "unmet"]
