"""megatron-core's local backend with our norm and core attention in it."""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import LocalSpecProvider

from dsplugins.plugins.backend.norm import Norm
from dsplugins.plugins.backend.sdpa import SdpaCoreAttention


class TorchLocalProvider(LocalSpecProvider):
    """Core's own parallel linears, `norm` for every norm, `attention` for core attention."""

    def __init__(self, norm: Any = Norm, attention: type[SdpaCoreAttention] = SdpaCoreAttention) -> None:
        self._norm, self._attention = norm, attention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """The kind comes from the config. Raises ValueError for a norm fused with the residual."""
        if has_residual:
            raise ValueError("torch_local has no norm that is fused with the residual: use the backend te")
        return self._norm

    def core_attention(self) -> type[SdpaCoreAttention]:
        """Causal attention on torch's kernels."""
        return self._attention


__all__ = ["TorchLocalProvider"]
