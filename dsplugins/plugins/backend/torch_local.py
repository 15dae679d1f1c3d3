"""Linears, norms and attention from megatron-core and torch alone: runs everywhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dsplugins.contracts import Problem
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.contracts import Plan, Settings


class TorchLocal:
    """The backend without TransformerEngine: core's Column- and RowParallelLinear, torch's norms and
    scaled-dot-product attention. On CPU and on GPUs; slower there than `te`, and the reference for it.
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Tells core, which otherwise assumes TransformerEngine."""
        return {"model.transformer_impl": "local", "model.persist_layer_norm": False}

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Settings that torch's norms and attention don't have."""
        from dsplugins.plugins.backend.sdpa import unmet

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
        ):
            if getattr(settings.model, name):
                yield Problem(
                    f"model.{name} needs the backend te", key=f"model.{name}", remedy="set it to false"
                )

    @hookimpl
    def ds_backend(self, config: MLATransformerConfig) -> BackendSpecProvider:
        """The provider that attention, MLPs, experts and MTP are built from."""
        from dsplugins.plugins.backend.local_provider import TorchLocalProvider

        return TorchLocalProvider()


def _recomputed_norms(config: MLATransformerConfig) -> Iterable[Problem]:
    """Core's `layernorm` there calls TransformerEngine without looking whether it is there (NameError)."""
    asked = config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ())
    if asked and importlib.util.find_spec("transformer_engine") is None:
        yield Problem(
            "model.recompute_modules: layernorm needs TransformerEngine, which isn't installed here",
            key="model.recompute_modules",
            remedy="leave it out and name the plugin v3_recompute, which covers all norms with any backend",
            kind="environment",
        )
