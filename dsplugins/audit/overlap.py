"""What DDP reduces and gathers behind computations, against what was asked for.

A bucket that isn't registered for overlap trains all the same: late, or with weights of the step before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dsplugins.optimizer_groups import leaves

if TYPE_CHECKING:
    from dsplugins.audit.built import Built

FLAGS = ("overlap_grad_reduce", "overlap_param_gather")


def differences(run: Built) -> Iterable[str]:
    """Buckets, hooks and calls that are not those of the overlap that was chosen."""
    wanted: Any = run.settings.ddp
    for index, chunk in enumerate(run.chunks):
        for said in (*_buckets(chunk, wanted), *_hooks(chunk, wanted)):
            yield f"chunk {index}: {said}"
    yield from _calls(run, wanted)
    for part in leaves(run.optimizer):
        told = getattr(part, "ddp_config", wanted).overlap_param_gather
        if told != wanted.overlap_param_gather:
            yield f"the optimizer holds overlap_param_gather={told}, chosen was {wanted.overlap_param_gather}"


def _groups(chunk: Any) -> list[Any]:
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def _buckets(chunk: Any, wanted: Any) -> Iterable[str]:
    """Each bucket is told of the overlap, and each parameter is in one, the one that its hook reports to."""
    for flag in FLAGS:
        chosen = getattr(wanted, flag)
        other = [group for group in _groups(chunk) if getattr(group.ddp_config, flag) != chosen]
        if other:
            yield f"{len(other)} bucket groups do not have {flag}={chosen}"
    homes = Counter(parameter for group in _groups(chunk) for parameter in group.params)
    for name, parameter in chunk.named_parameters():
        reported = getattr(chunk.param_to_bucket_group.get(parameter), "params", ())
        if parameter.requires_grad and (homes[parameter] != 1 or parameter not in reported):
            yield f"{name} is in {homes[parameter]} buckets or reports to another: its gradient would be lost"


def _hooks(chunk: Any, wanted: Any) -> Iterable[str]:
    """What starts a reduction stands behind each parameter, what starts a gather before each module."""
    trained = sum(parameter.requires_grad for parameter in chunk.parameters())
    if wanted.overlap_grad_reduce and not wanted.delay_wgrad_compute and len(chunk.grad_accs) != trained:
        yield f"{len(chunk.grad_accs)} of {trained} parameters start a reduction"
    hooked = set(chunk.remove_forward_pre_hook_handles)
    unhooked = [name for name, module in chunk.module.named_modules() if module not in hooked]
    if wanted.overlap_param_gather and unhooked:
        yield f"{len(unhooked)} modules would compute with weights of the step before: {unhooked[0] or 'all'}"
    if not wanted.overlap_param_gather and hooked:
        yield f"{len(hooked)} modules wait for weights that nobody chose to gather late"


def _calls(run: Built, wanted: Any) -> Iterable[str]:
    """What megatron-core's schedules call of each chunk."""
    aligned = wanted.overlap_param_gather and wanted.align_param_gather
    methods = {
        "no_sync_func": ("no_sync", True),
        "grad_sync_func": ("start_grad_sync", wanted.overlap_grad_reduce),
        "param_sync_func": ("start_param_sync", aligned),
    }
    for field, (method, chosen) in methods.items():
        expected = [getattr(chunk, method) for chunk in run.chunks] if chosen else []
        for config in run.configs:
            stands = getattr(config, field)
            stands = stands if isinstance(stands, list) else [stands] if stands is not None else []
            if stands != expected:
                yield f"config.{field} is not {method} of each chunk" if chosen else f"config.{field} is set"
