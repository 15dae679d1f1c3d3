"""Combined 1F1B: the expert all-to-all of one micro-batch hides behind the compute of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from dsplugins.contracts import Problem
from dsplugins.hookspecs import hookimpl
from dsplugins.plugins.schedule.interleaved import Interleaved, InterleavedOptions
from dsplugins.plugins.schedule.one_f_one_b import OneFOneB

if TYPE_CHECKING:
    from dsplugins.contracts import PipelineSchedule, Plan, Settings


@dataclass
class EpOverlapSchedule:
    """`contracts.PipelineSchedule`: another one, its layers run in parts, two micro-batches at a time."""

    inner: PipelineSchedule
    """Which layers stand where, and in which order chunks run."""
    chunks: int
    """Model chunks that a rank holds."""

    def forward_backward(self) -> Callable[..., list[Any]]:
        """megatron-core's function, given forward steps that return a plan where it asks for one."""
        return partial(combined, self.inner.forward_backward())

    def finalize_grads(self) -> Callable[..., None]:
        """The inner schedule's."""
        return self.inner.finalize_grads()

    def refuses(self, microbatches: int) -> str | None:
        """What the inner one refuses, and a single micro-batch, which has no other to hide behind."""
        if microbatches < 2:
            return (
                f"{microbatches} micro-batch a rank: there is no other one to hide its communication behind"
            )
        return self.inner.refuses(microbatches)


def combined(
    run: Callable[..., list[Any]], *, forward_step_func: Callable[..., Any], **more: Any
) -> list[Any]:
    """`run`, a forward-backward function of megatron-core's, with forward steps that can be planned."""
    return run(forward_step_func=planned(forward_step_func), **more)


def planned(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """`forward_step(batches, model)` as the combined schedule calls it.

    In training that hands over the bare model and wants its schedule plan, which takes the arguments of the
    model's forward; an evaluation runs the model as ever.
    """

    def step(batches: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        return forward_step(batches, model.build_schedule_plan if return_schedule_plan else model)

    return step


class EpOverlap:
    """megatron-core's combined 1F1B, `overlap_moe_expert_parallel_comm`.

    The idea of V3's DualPipe (arXiv 2412.19437, section 3.2.1) without its two-way pipeline: dispatch and
    combine of one micro-batch run on a stream of their own while attention and experts of another run
    backward, layer by layer.

    Without a pipeline, neighbouring micro-batches are paired; with one, those of the interleaved schedule. A
    rank holds the activations of one more micro-batch.
    """

    Options = InterleavedOptions
    contract = ">=1.0,<2"
    # With one queue of work to the device, communication waits behind the compute that should hide it.
    env: ClassVar[Mapping[str, str]] = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}

    def __init__(self, options: InterleavedOptions) -> None:
        self._group = options.group
        self._interleaved, self._plain = Interleaved(options), OneFOneB()

    @hookimpl
    def ds_settings(self, plan: Plan) -> Mapping[str, object]:
        """The overlap, and what the schedule inside needs."""
        return {**self._inner(plan).ds_settings(plan=plan), "model.overlap_moe_expert_parallel_comm": True}

    @hookimpl
    def ds_check(self, plan: Plan, settings: Settings) -> Iterable[Problem]:
        """What megatron-core doesn't refuse by itself, but would ignore or fail on later."""
        layout = plan.layout
        if layout.pipeline > 1:
            yield from self._interleaved.ds_check(plan=plan, settings=settings)
        elif self._group is not None:
            said = f"plugins.ep_overlap.group={self._group} means nothing without a pipeline"
            yield Problem(said, "plugins.ep_overlap.group", "leave it out")
        if settings.model.delay_wgrad_compute and plan.slots["backend"] != "te":
            backend = plan.slots["backend"]
            said = f"model.delay_wgrad_compute=True: the linears of {backend} would not delay theirs"
            yield Problem(said, "model.delay_wgrad_compute", "leave it out, or name the backend te")

    @hookimpl
    def ds_schedule(self, plan: Plan) -> PipelineSchedule:
        """The schedule for this plan's stages and chunks."""
        inner = self._inner(plan).ds_schedule(plan=plan)
        return EpOverlapSchedule(inner, inner.chunks)

    def _inner(self, plan: Plan) -> Interleaved | OneFOneB:
        return self._plain if plan.layout.pipeline == 1 else self._interleaved
