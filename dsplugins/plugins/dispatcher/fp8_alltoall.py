"""Tokens to their experts in FP8 by all-to-all, and their outputs back in 16 bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dsplugins.contracts import DispatcherFactory, Plan, Problem, Settings
from dsplugins.hookspecs import hookimpl
from dsplugins.plugins.dispatcher.refusals import refused

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import MLATransformerConfig


class Fp8AllToAll:
    """All-to-all with tokens as E4M3, a power-of-two scale for each 128 channels (arXiv 2412.19437, 3.3.3).

    Half of the bytes of `alltoall` on the way there, and all of them on the way back, since sums need 16
    bits: three quarters together. So in backward: gradients of outputs travel to the experts in FP8,
    gradients of tokens back in 16 bits. With `fp8_v3`, whose experts quantise what arrives by the same rule,
    forward is that of `alltoall` to the bit. A rank that has nobody to send to rounds its tokens, too:
    layouts agree.
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The type that other parts of core read."""
        return {"model.moe_token_dispatcher_type": "alltoall"}

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """What core's own order of things can't do here, and kernels that aren't there."""
        yield from refused("fp8_alltoall", plan, settings)
        if plan.slots.get("platform") == "cuda" and importlib.util.find_spec("triton") is None:
            yield Problem(
                "fp8_alltoall needs triton on a GPU, which isn't installed here",
                key="plugins.fp8_alltoall",
                remedy="install a CUDA build of torch, which brings it along",
                kind="environment",
            )

    @hookimpl
    def ds_dispatcher(self, config: MLATransformerConfig) -> DispatcherFactory:
        """Core's order of things around an exchange of our own."""
        from dsplugins.plugins.dispatcher.fp8_exchange import Fp8AllToAllDispatcher

        return Fp8AllToAllDispatcher
