"""Tokens to their experts by all-to-all: megatron-core's dispatcher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dsplugins.contracts import DispatcherFactory, Plan, Problem, Settings
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import MLATransformerConfig


class AllToAll:
    """megatron-core's all-to-all dispatcher; each token travels once for each expert that it goes to."""

    contract = ">=1.0,<2"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The type that other parts of core read."""
        return {"model.moe_token_dispatcher_type": "alltoall"}

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """Overlapped shared experts run inside the dispatcher, which has to be handed them: it isn't."""
        if not settings.model.moe_shared_expert_overlap:
            return []
        key = "model.moe_shared_expert_overlap"
        said = f"{key}=True: the shared experts would be left out, alltoall isn't given them"
        return [Problem(said, key, "leave it out: the shared experts then run on their own")]

    @hookimpl
    def ds_dispatcher(self, config: MLATransformerConfig) -> DispatcherFactory:
        """Core's, with split sizes that gloo can read."""
        from dsplugins.plugins.dispatcher.host_splits import AllToAllDispatcher

        return AllToAllDispatcher
