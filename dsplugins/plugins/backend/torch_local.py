"""Linears, norms and attention from megatron-core and torch alone: runs everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dsplugins import apex, cudnn
from dsplugins.contracts import Problem
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.contracts import Plan, Settings


@dataclass(frozen=True)
class TorchLocalOptions:
    """Options of TorchLocal."""

    norm: Literal["torch", "apex"] = "torch"
    """Whose kernels make the norms: torch's, or the fused ones of NVIDIA's apex, on GPUs."""
    attention: Literal["torch", "cudnn"] = "torch"
    """Whose kernels are core attention on a GPU: those that torch chooses, for MLA's two head sizes the
    memory-efficient ones, or cuDNN's, on Hopper with cuDNN 9.11."""
    fused_weight_gradient: bool = False
    """Add the weight gradient of a linear to its FP32 buffer inside the product, by a kernel of NVIDIA's apex
    (`model.gradient_accumulation_fusion`), on GPUs. Core's linears only, not packed experts."""


class TorchLocal:
    """The backend without TransformerEngine: core's Column- and RowParallelLinear, torch's norms and
    scaled-dot-product attention. On CPU and on GPUs; slower there than `te`, and the reference for it.
    """

    Options = TorchLocalOptions
    contract = ">=1.0,<2"

    def __init__(self, options: TorchLocalOptions | None = None) -> None:
        self.options = options or TorchLocalOptions()
        if self._of_apex():
            self.stand_in = "torch_local"  # with its defaults: `check` builds without a GPU and without apex

    def _of_apex(self) -> list[tuple[str, str]]:
        """(option, extension of apex that it needs) of what was chosen."""
        wanted = {
            ("norm", "fused_layer_norm_cuda"): self.options.norm == "apex",
            ("fused_weight_gradient", "fused_weight_gradient_mlp_cuda"): self.options.fused_weight_gradient,
        }
        return [option for option, chosen in wanted.items() if chosen]

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Tells core, which otherwise assumes TransformerEngine, and takes none of its kernels."""
        return {
            "model.transformer_impl": "local",
            "model.moe_permute_fusion": False,
            "model.persist_layer_norm": False,
            "model.gradient_accumulation_fusion": self.options.fused_weight_gradient,
        }

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Settings that torch's norms and attention don't have, and kernels that aren't here."""
        from dsplugins.plugins.backend.sdpa import unmet

        for option, extension in self._of_apex():
            yield from apex.chosen(f"plugins.torch_local.{option}", plan, extension)
        if self.options.attention == "cudnn":
            yield from cudnn.attention("plugins.torch_local.attention", plan)
        for key, message in unmet(settings.model).items():
            yield Problem(message, key=key, remedy="change it, or name the backend te")
        yield from _recomputed_norms(settings.model)
        if settings.model.normalization not in ("RMSNorm", "LayerNorm"):
            yield Problem(
                f"torch_local has no normalization {settings.model.normalization}",
                key="model.normalization",
                remedy="RMSNorm or LayerNorm",
            )
        for name in (
            "layernorm_zero_centered_gamma",
            "memory_efficient_layer_norm",
            "fused_residual_rmsnorm",
            "use_te_activation_func",
            "cpu_offloading",
        ):
            if getattr(settings.model, name):
                yield Problem(
                    f"model.{name} needs the backend te", key=f"model.{name}", remedy="set it to false"
                )

    @hookimpl
    def ds_backend(self, config: MLATransformerConfig) -> BackendSpecProvider:
        """The provider that attention, MLPs, experts and MTP are built from."""
        from dsplugins.plugins.backend.local_provider import TorchLocalProvider
        from dsplugins.plugins.backend.norm import Norm
        from dsplugins.plugins.backend.sdpa import CudnnCoreAttention, SdpaCoreAttention

        norm: Any = Norm
        if self.options.norm == "apex":
            from dsplugins.plugins.backend.apex_norm import ApexNorm

            norm = ApexNorm
        by_cudnn = self.options.attention == "cudnn"
        return TorchLocalProvider(norm, CudnnCoreAttention if by_cudnn else SdpaCoreAttention)


def _recomputed_norms(config: MLATransformerConfig) -> Iterable[Problem]:
    """Core's `layernorm` there calls TransformerEngine without looking whether it is there (NameError).
    Where it is, the recipe would run, and is refused all the same: what is installed decides nothing.
    """
    if config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ()):
        yield Problem(
            "model.recompute_modules: layernorm is made for the norms of TransformerEngine",
            key="model.recompute_modules",
            remedy="leave it out and name the plugin v3_recompute, which covers all norms with any backend",
        )
