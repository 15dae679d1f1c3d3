"""Gradient reduction behind the backward pass, weight gathering behind the forward pass: fields and refusals.

megatron-core's DDP wrapper does both; its own arguments check what goes with what (megatron/training/
arguments.py), the core alone asserts late or ignores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dsplugins.contracts import Problem

if TYPE_CHECKING:
    from dsplugins.contracts import Plan, Settings
    from dsplugins.plugins.optimizer.adamw import AdamWOptions

GRADIENTS, WEIGHTS = "plugins.adamw.overlap_grad_reduce", "plugins.adamw.overlap_param_gather"


def fields(options: AdamWOptions, plan: Plan | None) -> Mapping[str, object]:
    """What the wrapper and the optimizer are told; both have to know of a gather that comes later."""
    chunks = plan.layout.virtual_pipeline if plan is not None else 1
    return {
        "ddp.overlap_grad_reduce": options.overlap_grad_reduce,
        "ddp.overlap_param_gather": options.overlap_param_gather,
        "optimizer.overlap_param_gather": options.overlap_param_gather,
        # As core's own default: stages of several chunks gather at the same time, others when they need to.
        "ddp.align_param_gather": options.overlap_param_gather and chunks > 1,
    }


def problems(options: AdamWOptions, plan: Plan, settings: Settings) -> Iterable[Problem]:
    """Wishes that core would refuse in the middle of a run, or take and ignore."""
    if options.overlap_param_gather:
        yield from _gather(options)
    if options.overlap_grad_reduce:
        yield from _reduce(plan, settings)
    else:
        yield from _buckets(settings)
    if settings.optimizer.overlap_param_gather_with_optimizer_step:
        key = "optimizer.overlap_param_gather_with_optimizer_step"
        yield Problem(f"{key}=true can't be checkpointed", key, f"leave it out, and set {WEIGHTS}")


def _gather(options: AdamWOptions) -> Iterable[Problem]:
    if not options.zero:
        said = f"{WEIGHTS}=true has nothing to gather: with zero=false each rank updates all weights"
        yield Problem(said, WEIGHTS, "drop it, or set plugins.adamw.zero: true")
    if not options.overlap_grad_reduce:
        said = f"{WEIGHTS}=true needs overlap_grad_reduce=true, which cuts weights into buckets"
        yield Problem(said, WEIGHTS, f"set {GRADIENTS}: true as well")


def _reduce(plan: Plan, settings: Settings) -> Iterable[Problem]:
    layout = plan.layout
    if layout.data * layout.context == 1 and (layout.expert_data == 1 or not settings.model.num_moe_experts):
        said = f"{GRADIENTS}=true has no effect: no two ranks hold the same weights"
        yield Problem(said, GRADIENTS, "drop it, and overlap_param_gather with it")
    if settings.model.delay_wgrad_compute and not _transformer_engine():
        said = f"{GRADIENTS}=true can't go with model.delay_wgrad_compute without transformer-engine 2.8"
        yield Problem(said, GRADIENTS, "drop one of the two")


def _buckets(settings: Settings) -> Iterable[Problem]:
    for field in ("bucket_size", "num_buckets"):
        if getattr(settings.ddp, field) is not None and f"ddp.{field}" in settings.writers:
            said = f"ddp.{field} has no effect: without overlap_grad_reduce there is one bucket"
            yield Problem(said, f"ddp.{field}", f"remove it, or set {GRADIENTS}: true")


def _transformer_engine() -> bool:
    """Whether a transformer-engine is here that reduces gradients which are computed late."""
    from megatron.core.utils import is_te_min_version

    return bool(is_te_min_version("2.8.0"))
