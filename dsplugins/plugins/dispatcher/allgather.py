"""Tokens to their experts by gathering all of them everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsplugins.contracts import DispatcherFactory, Plan
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import MLATransformerConfig


class AllGather:
    """megatron-core's all-gather dispatcher: simple, and dear as expert parallelism grows."""

    contract = ">=1.0,<2"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The type that other parts of core read."""
        return {"model.moe_token_dispatcher_type": "allgather"}

    @hookimpl
    def ds_dispatcher(self, config: MLATransformerConfig) -> DispatcherFactory:
        """Core's own."""
        from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

        return MoEAllGatherTokenDispatcher
