"""One forward, one backward: the schedule with one model chunk a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsplugins.contracts import Problem
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from dsplugins.contracts import PipelineSchedule, Plan, Settings


@dataclass
class OneFOneBSchedule:
    """`contracts.PipelineSchedule` with one chunk a rank, with or without a pipeline."""

    pipeline: int
    """Stages."""
    chunks: int = 1

    def forward_backward(self) -> Callable[..., list[Any]]:
        """megatron-core's function for one stage, or for many without interleaving."""
        from megatron.core.pipeline_parallel import schedules

        if self.pipeline == 1:
            return schedules.forward_backward_no_pipelining
        return schedules.forward_backward_pipelining_without_interleaving

    def finalize_grads(self) -> Callable[..., None]:
        """megatron-core's own."""
        from megatron.core.distributed import finalize_model_grads

        return finalize_model_grads

    def refuses(self, microbatches: int) -> str | None:
        """Never: fewer micro-batches than stages only leave stages idle."""
        return None


class OneFOneB:
    """1F1B (PipeDream-Flush, arXiv 2006.09503 section 2.2), and plain accumulation without a pipeline.

    Idle share of a step: (P - 1) / (M + P - 1) with P stages and M micro-batches.
    """

    contract = ">=1.0,<2"

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Activations are sent and received in one batch, between two computations; nothing is overlapped."""
        return {
            "model.overlap_p2p_comm": False,
            "model.batch_p2p_comm": True,
            "model.overlap_moe_expert_parallel_comm": False,
        }

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """More than one chunk a rank."""
        if plan.layout.virtual_pipeline > 1:
            yield Problem(
                f"one_f_one_b has one chunk a rank, parallel.virtual_pipeline={plan.layout.virtual_pipeline}",
                key="parallel.virtual_pipeline",
                remedy="set it to 1, or name the schedule interleaved",
            )

    @hookimpl
    def ds_schedule(self, plan: Plan) -> PipelineSchedule:
        """The schedule for this plan's number of stages."""
        return OneFOneBSchedule(plan.layout.pipeline)
