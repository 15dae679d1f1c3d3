"""Tokens to their experts by all-to-all: megatron-core's dispatcher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dsplugins.contracts import DispatcherFactory, Plan, Problem, Settings
from dsplugins.hookspecs import hookimpl
from dsplugins.plugins.dispatcher.refusals import refused

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import MLATransformerConfig


class AllToAll:
    """megatron-core's all-to-all dispatcher; each token travels once for each expert that it goes to.

    On CUDA what comes back of a token is added up in FP32, in one pass and the same bits every time, unless
    `model.moe_permute_fusion` takes TransformerEngine's kernels for that.
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The type that other parts of core read."""
        return {"model.moe_token_dispatcher_type": "alltoall"}

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """What core's own order of things can't do here."""
        return refused("alltoall", plan, settings)

    @hookimpl
    def ds_dispatcher(self, config: MLATransformerConfig) -> DispatcherFactory:
        """Core's, with split sizes that gloo can read and sums of its own on CUDA."""
        from dsplugins.plugins.dispatcher.alltoall_dispatcher import AllToAllDispatcher

        return AllToAllDispatcher
