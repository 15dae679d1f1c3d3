"""Interleaved 1F1B: several model chunks a rank, for a smaller bubble."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from dsplugins.contracts import Problem, Range
from dsplugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from dsplugins.contracts import PipelineSchedule, Plan, Settings


@dataclass
class InterleavedSchedule:
    """`contracts.PipelineSchedule` with `chunks` chunks a rank."""

    pipeline: int
    """Stages."""
    chunks: int
    group: int
    """Micro-batches that a chunk takes in a row."""

    def forward_backward(self) -> Callable[..., list[Any]]:
        """megatron-core's interleaved function."""
        from megatron.core.pipeline_parallel import schedules

        return schedules.forward_backward_pipelining_with_interleaving

    def finalize_grads(self) -> Callable[..., None]:
        """megatron-core's own."""
        from megatron.core.distributed import finalize_model_grads

        return finalize_model_grads

    def refuses(self, microbatches: int) -> str | None:
        """megatron-core's rule (schedules.py, interleaving): the last group is full or not below P."""
        if microbatches < self.group:
            return f"{microbatches} micro-batches are fewer than a group of {self.group}"
        rest = microbatches % self.group
        if 0 < rest < self.pipeline:
            return (
                f"{microbatches} micro-batches in groups of {self.group} leave {rest}: "
                f"must be 0 or at least the {self.pipeline} stages"
            )
        return None


@dataclass(frozen=True)
class InterleavedOptions:
    """Options of the interleaved schedule."""

    group: Annotated[int | None, Range(1.0, None)] = None
    """Micro-batches that a chunk takes in a row, at least the number of stages; null: exactly that many.

    megatron-core's `microbatch_group_size_per_vp_stage`. More need more memory and overlap better.
    Every step's number of micro-batches must leave 0 or at least P after division by it.
    """


class Interleaved:
    """1F1B with `parallel.virtual_pipeline` chunks a rank (arXiv 2104.04473, section 2.2).

    The bubble of 1F1B divided by the number of chunks, for as many times its messages. With 2 stages
    the two messages between the same two ranks get mixed up unless they are sent apart from each
    other, with corrupted gradients and no error: `overlap_p2p_comm` on and `batch_p2p_comm` off.
    """

    Options = InterleavedOptions
    contract = ">=1.0,<2"

    def __init__(self, options: InterleavedOptions) -> None:
        self.options = options

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """Messages apart from each other; see the class."""
        return {
            "model.overlap_p2p_comm": True,
            "model.batch_p2p_comm": False,
            "model.overlap_moe_expert_parallel_comm": False,
            "model.microbatch_group_size_per_vp_stage": self._group(plan),
        }

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """No pipeline, one chunk, a group below the number of stages."""
        layout, group = plan.layout, self._group(plan)
        if layout.pipeline == 1:
            yield Problem(
                "the schedule interleaved needs parallel.pipeline > 1",
                key="parallel.pipeline",
                remedy="raise it, or name the schedule one_f_one_b",
            )
        if layout.virtual_pipeline == 1:
            yield Problem(
                "the schedule interleaved needs parallel.virtual_pipeline > 1",
                key="parallel.virtual_pipeline",
                remedy="raise it, or name the schedule one_f_one_b",
            )
        if group < layout.pipeline:
            yield Problem(
                f"plugins.interleaved.group={group} is below parallel.pipeline={layout.pipeline}",
                key="plugins.interleaved.group",
                remedy=f"at least {layout.pipeline}, or null",
            )

    @hookimpl
    def ds_schedule(self, plan: Plan) -> PipelineSchedule:
        """The schedule for this plan's stages and chunks."""
        return InterleavedSchedule(plan.layout.pipeline, plan.layout.virtual_pipeline, self._group(plan))

    def _group(self, plan: Plan) -> int:
        return plan.layout.pipeline if self.options.group is None else self.options.group
