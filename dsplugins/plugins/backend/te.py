"""Linears, norms and attention from NVIDIA's TransformerEngine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from dsplugins.contracts import EnvironmentUnfit, Problem
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from dsplugins.contracts import Plan, Settings

MISSING = "the backend te needs TransformerEngine, which isn't installed here"
REMEDY = "pip install 'dsplugins[te]' on a machine with CUDA, or name the backend torch_local instead"


class TransformerEngine:
    """megatron-core's `TESpecProvider`: fused norms and linears, fused attention, grouped GEMM. GPUs only."""

    contract = ">=1.0,<2"
    stand_in: ClassVar[str] = "torch_local"
    """Its modules have the same parameters, and need no GPU to be made; see `dsplugins.stand_ins`."""

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """What core itself asks for where it looks at the backend by name."""
        return {"model.transformer_impl": "transformer_engine"}

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """TransformerEngine missing from this machine, or a platform without CUDA."""
        if importlib.util.find_spec("transformer_engine") is None:
            yield Problem(MISSING, key="plugins.te", remedy=REMEDY, kind="environment")
        if plan.slots.get("platform") == "cpu":
            yield Problem(
                "the backend te needs CUDA, but the platform is cpu",
                key="plugins.te",
                remedy="name the platform cuda or the backend torch_local",
            )

    @hookimpl
    def ds_backend(self, config: MLATransformerConfig) -> BackendSpecProvider:
        """Core's provider. Raises `EnvironmentUnfit` where core couldn't import TransformerEngine:
        core would go on with mock objects in place of the modules.
        """
        from megatron.core.extensions.transformer_engine import HAVE_TE

        if not HAVE_TE:
            raise EnvironmentUnfit(f"{MISSING}: {REMEDY}")
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
