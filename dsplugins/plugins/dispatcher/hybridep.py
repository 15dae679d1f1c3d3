"""Tokens to their experts by HybridEP: permuted on the way, over NVLink domains of any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dsplugins.contracts import Problem, Range
from dsplugins.plugins.dispatcher.flex import Flex
from dsplugins.plugins.dispatcher.sources import parameters, source

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, Settings

CALLED = frozenset(
    (
        *("hidden", "routing_map", "probs", "scaling_factor", "handle"),
        *("num_of_experts_per_rank", "pad_multiple", "num_permuted_tokens", "non_blocking"),
    )
)
"""What megatron-core's `fused_a2a` gives `HybridEPBuffer.dispatch_with_permute`."""
FUSED = "fuse_permute_dispatch"
"""Without this parameter core warns and goes on unfused."""


@dataclass(frozen=True)
class HybridEPOptions:
    """Options of `hybridep`, by megatron-core's names; null is the library's own default."""

    moe_flex_dispatcher_num_sms: Annotated[int | None, Range(1.0, None)] = None
    """SMs that dispatch and combine take from computation."""
    moe_hybridep_num_sms_preprocessing: Annotated[int | None, Range(1.0, None)] = None
    """SMs for the kernel that reads the routing map; null: megatron-core's 108."""
    moe_permute_fusion_into_hybridep: bool = False
    """Sort tokens by expert in the kernels that send them."""
    moe_hybridep_num_blocks_permute: Annotated[int | None, Range(1.0, None)] = None
    """Thread blocks that sort received tokens by expert."""
    moe_hybridep_num_blocks_unpermute: Annotated[int | None, Range(1.0, None)] = None
    """Thread blocks that bring experts' outputs back into the tokens' order."""


class HybridEP(Flex):
    """NVIDIA's kernels on DeepEP's branch `hybrid-ep`, through megatron-core's flex dispatcher. BF16.

    They send a token once to each NVLink domain, like `deepep`, and hand tokens to the experts already
    sorted. Where a domain is not a node of 8 GPUs (an NVL72 rack), NVLINK_DOMAIN_SIZE tells them its size.
    """

    Options = HybridEPOptions
    name = "hybridep"
    backend = "hybridep"
    have = "HAVE_HYBRIDEP"
    get = "build deep_ep from the branch hybrid-ep of github.com/deepseek-ai/DeepEP, or name alltoall"

    def unfit(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """A budget that drops tokens: megatron-core only notes that it did, for callers who ask."""
        field = "moe_expert_rank_capacity_factor"
        if (factor := getattr(settings.model, field)) is not None:
            said = f"model.{field}={factor}: hybridep would drop tokens above it without a word"
            yield Problem(said, f"model.{field}", "leave it out: nothing is dropped then")

    def library(self) -> Iterator[Problem]:
        """HybridEP missing from this machine, or other than megatron-core calls it."""
        text = source("deep_ep", "hybrid_ep_buffer.py")
        if text is None:
            yield self.lacks("needs deep_ep with HybridEPBuffer, which isn't installed here")
            return
        found = parameters(text, "HybridEPBuffer.dispatch_with_permute")
        wanted = CALLED | ({FUSED} if self._fuses() else set())
        unknown = sorted(wanted - found.all) if found else ["HybridEPBuffer"]
        if unknown:
            yield self.lacks(f"the deep_ep that is installed here doesn't know {', '.join(unknown)}")

    def _fuses(self) -> bool:
        options = self._options
        blocks = (options.moe_hybridep_num_blocks_permute, options.moe_hybridep_num_blocks_unpermute)
        return options.moe_permute_fusion_into_hybridep or any(block is not None for block in blocks)
