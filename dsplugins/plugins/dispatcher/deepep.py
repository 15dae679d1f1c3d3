"""Tokens to their experts by DeepEP: once to each node, and from there by NVLink."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dsplugins.contracts import Problem, Range
from dsplugins.plugins.dispatcher.flex import Flex
from dsplugins.plugins.dispatcher.sources import source

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, Settings

SIZES = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
"""Ranks for which DeepEP's `Buffer.get_dispatch_config` has a configuration (its deep_ep/buffer.py)."""
ALIGNED = 8
"""BF16 numbers in the 16 bytes that its kernels copy at a time (its csrc/deep_ep.cpp)."""


@dataclass(frozen=True)
class DeepEPOptions:
    """Options of `deepep`, by megatron-core's names."""

    moe_flex_dispatcher_num_sms: Annotated[int | None, Range(2.0, None)] = None
    """SMs that dispatch and combine take from computation; even. null: megatron-core's 20."""


class DeepEP(Flex):
    """DeepSeek's all-to-all kernels, through megatron-core's flex dispatcher. Hopper or newer, BF16.

    A token crosses to each node at most once, to the GPU of its own number there, and goes on by NVLink to
    the ranks that hold its experts (arXiv 2412.19437, section 3.2.2). With `moe_router_group_topk` of V3, 4
    of 8 groups on 8 nodes, that is at most 4 copies of a token over the network, where `alltoall` sends one
    for each of its 8 experts. Needs `deep_ep` built from its source, NVLink in a node, RDMA between nodes.
    """

    Options = DeepEPOptions
    name = "deepep"
    backend = "deepep"
    have = "HAVE_DEEP_EP"
    get = "build deep_ep from github.com/deepseek-ai/DeepEP, or name the dispatcher alltoall"

    def unfit(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """Group sizes, SM counts and widths that DeepEP asserts against in the first step."""
        ranks = plan.layout.expert * plan.layout.expert_tensor
        if ranks > 1 and ranks not in SIZES:
            said = f"parallel.expert x parallel.expert_tensor is {ranks}: DeepEP has no configuration for it"
            yield Problem(said, "parallel.expert", f"one of {', '.join(map(str, SIZES))}")
        field = "moe_flex_dispatcher_num_sms"
        if (sms := getattr(settings.model, field) or 0) % 2:
            key = f"{self._key}.{field}"
            yield Problem(f"{key}={sms}: DeepEP takes an even number of SMs", key, f"{sms - 1} or {sms + 1}")
        if (width := settings.model.hidden_size) % ALIGNED:
            said = f"model.hidden_size={width} is not a multiple of {ALIGNED}, which DeepEP needs"
            yield Problem(said, "model.hidden_size", "change it, or name the dispatcher alltoall")

    def library(self) -> Iterator[Problem]:
        """DeepEP missing from this machine."""
        if source("deep_ep", "__init__.py") is None:
            yield self.lacks("needs the package deep_ep, which isn't installed here")
