"""Tokens to their experts by NCCL's expert-parallel kernels, which TransformerEngine carries."""

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
        *("ep_group", "num_experts", "max_tokens_per_rank", "recv_capacity_per_rank", "hidden_dim"),
        *("max_num_sms", "zero_copy"),
    )
)
"""What megatron-core's `fused_a2a` gives TransformerEngine's `ep_bootstrap`."""
NCCL = (2, 30, 4)
"""The oldest NCCL that has the kernels (TransformerEngine's pytorch/ep.py)."""
IGNORED = ("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity")
"""Fields that the backend never looks at: dropped tokens would travel all the same."""


@dataclass(frozen=True)
class NcclEPOptions:
    """Options of `nccl_ep`, by megatron-core's names."""

    moe_expert_rank_capacity_factor: Annotated[float, Range(0.0, None)]
    """Room for what a rank receives, in its own tokens x experts a token. More than fits ends the run, so
    leave room for imbalance; parallel.expert is always enough."""
    moe_flex_dispatcher_num_sms: Annotated[int | None, Range(1.0, None)] = None
    """SMs that dispatch and combine may take from computation; null: NCCL chooses."""


class NcclEP(Flex):
    """NCCL EP, megatron-core's flex backend `ncclep`. Hopper or newer with NVLink multicast, BF16.

    Received tokens come sorted by expert, in a buffer of a fixed size. Needs TransformerEngine built with
    NVTE_BUILD_WITH_NCCL_EP=1, of a version that megatron-core can call: 2.20 asks for `num_topk` at the
    start, which megatron-core 0.19.2 doesn't give, and is refused here instead of in the first step.
    """

    Options = NcclEPOptions
    name = "nccl_ep"
    backend = "ncclep"
    have = "HAVE_TE_EP"
    get = "build TransformerEngine with NVTE_BUILD_WITH_NCCL_EP=1, of a version that has it as megatron-core "
    get += "calls it, or name the dispatcher alltoall"

    def unfit(self, plan: Plan, settings: Settings) -> Iterator[Problem]:
        """Fields that mean nothing here, and fixed shapes without experts that can take them."""
        model = settings.model
        for field in IGNORED:
            if getattr(model, field):
                said = f"model.{field}={getattr(model, field)} means nothing to nccl_ep"
                yield Problem(said, f"model.{field}", "leave it out, or name another dispatcher")
        fused = model.use_transformer_engine_op_fuser and model.moe_grouped_gemm
        for field in ("moe_ncclep_static_shape", "moe_ncclep_zero_copy"):
            if getattr(model, field) and not fused:
                said = f"model.{field}=True needs experts of TransformerEngine's op fuser"
                yield Problem(said, f"model.{field}", "leave it out: shapes then follow what was received")

    def library(self) -> Iterator[Problem]:
        """TransformerEngine missing, without NCCL EP, or other than megatron-core calls it; an old NCCL."""
        text = source("transformer_engine", "pytorch/ep.py")
        found = parameters(text, "ep_bootstrap") if text else None
        if found is None:
            yield self.lacks("needs TransformerEngine with NCCL EP, which isn't installed here")
            return
        if missing := sorted(found.required - CALLED):
            asked = f"asks for {', '.join(missing)}, which megatron-core doesn't give"
            yield self.lacks(f"the ep_bootstrap of the TransformerEngine that is installed here {asked}")
        yield from self._nccl()

    def _nccl(self) -> Iterator[Problem]:
        import torch

        if torch.cuda.is_available() and (version := torch.cuda.nccl.version()) < NCCL:
            needs, has = (".".join(map(str, numbers)) for numbers in (NCCL, version))
            said = f"{self._key}: needs NCCL {needs} or newer, torch has {has}"
            yield Problem(said, self._key, "install a newer nvidia-nccl", kind="environment")
