"""megatron-core's local backend with our norm and core attention in it."""

from __future__ import annotations

from megatron.core.models.backends import LocalSpecProvider

from dsplugins.plugins.backend.norm import Norm
from dsplugins.plugins.backend.sdpa import SdpaCoreAttention


class TorchLocalProvider(LocalSpecProvider):
    """Core's own parallel linears, `norm.Norm` for every norm, `sdpa.SdpaCoreAttention`."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type[Norm]:
        """The kind comes from the config. Raises ValueError for a norm fused with the residual."""
        if has_residual:
            raise ValueError("torch_local has no norm that is fused with the residual: use the backend te")
        return Norm

    def core_attention(self) -> type[SdpaCoreAttention]:
        """Causal attention on torch's kernels."""
        return SdpaCoreAttention


__all__ = ["TorchLocalProvider"]
