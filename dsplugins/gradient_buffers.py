"""Where weights lie in megatron-core's flat buffers: the experts of a layer together, however they are held.

Data-parallel ranks sum gradients, and with ZeRO share the optimizer's work, by position in these buffers
(distributed/param_and_grad_buffer.py). Core fills them parameter by parameter, so experts that are held apart
(fc1 and fc2 of one expert, then of the next) would lie otherwise than stacked ones (fc1 of all, then fc2 of
all): other sums, other shares, another last digit. Here the former lie as the latter do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import (
    _compute_default_per_buffer_param_layout,
    group_params_for_buffers,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout, PerBufferParamLayout

APART = re.compile(r"(?P<module>.+)\.local_experts\.(?P<expert>\d+)\.(?P<matrix>.+)")
"""How core names what belongs to one expert (transformer/moe/experts.py, SequentialMLP)."""

ALIGNED = 64
"""Elements: core starts each parameter at a multiple of it (optimizer/param_layout.py)."""

MARKS = ("allreduce", "is_managed_by_layer_wise_optimizer")
"""Attributes of a parameter that choose its buffer (`group_params_for_buffers`)."""


@dataclass(frozen=True)
class _Member:
    """A parameter and its place: neighbours of one `module` lie matrix by matrix, expert by expert."""

    parameter: torch.nn.Parameter
    size: int
    """Elements of one expert's matrix."""
    module: str = ""
    matrix: str = ""
    expert: int = 0


def bucket_size(
    ddp: DistributedDataParallelConfig, ranks: int, *, first_chunk: bool, first_stage: bool
) -> int | None:
    """Elements after which core closes a bucket; None where it makes one of all.

    Its own rule (distributed/distributed_data_parallel.py): buckets are for what is summed while a backward
    pass runs, and only the first chunk of the first stage has others waiting for it.
    """
    if not ddp.overlap_grad_reduce or not first_chunk or not first_stage:
        return None
    return max(40_000_000, 1_000_000 * ranks) if ddp.bucket_size is None else int(ddp.bucket_size)


def layout(
    chunk: torch.nn.Module,
    ddp: DistributedDataParallelConfig,
    bucket: int | None,
    ranks: int,
    expert_ranks: int,
) -> FullParamLayout:
    """What core's DDP takes as `full_param_layout`.

    `ranks` and `expert_ranks` share the gradients of dense weights and of experts; `bucket` is what
    `bucket_size` says. A layer's experts are in one bucket, however many elements they have.
    """
    members = [
        _member(name, parameter) for name, parameter in chunk.named_parameters() if parameter.requires_grad
    ]
    fp32 = ddp.grad_reduce_in_fp32
    blocks: list[list[_Member]] = []
    for _, near in groupby(members, lambda member: member.module or id(member)):
        block = list(near)
        blocks += [block] if _fits(block, fp32) else [[one] for one in block]
    stands_for = {_stand_in(block): block for block in blocks}
    found = _of(list(stands_for), ddp, bucket, ranks, expert_ranks)
    order = group_params_for_buffers([member.parameter for member in members], fp32)
    for key, cut in found.layouts.items():
        places = {
            parameter: (start, start + parameter.numel(), number)
            for stand_in, (begin, _, number) in cut.param_index_map.items()
            for parameter, start in _positions(stands_for[stand_in], begin)
        }
        mine, cut.param_indices = order[key]
        cut.param_index_map = {parameter: places[parameter] for parameter in reversed(mine)}
    return found


def _member(name: str, parameter: torch.nn.Parameter) -> _Member:
    elements = parameter.numel()
    if apart := APART.fullmatch(name):
        return _Member(parameter, elements, apart["module"], apart["matrix"], int(apart["expert"]))
    if getattr(parameter, "stacked", False):
        module, _, matrix = name.rpartition(".")
        return _Member(parameter, elements // len(parameter), module, matrix)
    return _Member(parameter, elements)


def _fits(block: Sequence[_Member], fp32: bool) -> bool:
    """Whether the block is of one buffer and leaves no holes, so that it is a stack of equal matrices."""
    parameters = [each.parameter for each in block]
    sizes = {(each.matrix, each.size) for each in block}
    return (
        len(block) > 1
        and all(type(parameter) is torch.nn.Parameter for parameter in parameters)
        and len(group_params_for_buffers(parameters, fp32)) == 1
        and len(sizes) == len({matrix for matrix, _ in sizes})
        and not any(size % ALIGNED for _, size in sizes)
    )


def _stand_in(block: Sequence[_Member]) -> torch.nn.Parameter:
    """One parameter of the block's size, of which core asks no more than this."""
    if len(block) == 1:
        return block[0].parameter
    first = block[0].parameter
    elements = sum(member.parameter.numel() for member in block)
    found = torch.nn.Parameter(torch.empty(elements, dtype=first.dtype, device="meta"))
    for mark in MARKS:
        if hasattr(first, mark):
            setattr(found, mark, getattr(first, mark))
    return found


def _positions(block: Sequence[_Member], start: int) -> Iterable[tuple[torch.nn.Parameter, int]]:
    """Matrices last to first, as core goes through parameters, and the experts of each first to last."""
    matrices = list(dict.fromkeys(member.matrix for member in block))
    for matrix in reversed(matrices):
        for member in sorted((one for one in block if one.matrix == matrix), key=lambda one: one.expert):
            yield member.parameter, start
            start += member.parameter.numel()


def _of(
    parameters: list[torch.nn.Parameter],
    ddp: DistributedDataParallelConfig,
    bucket_size: int | None,
    ranks: int,
    expert_ranks: int,
) -> FullParamLayout:
    """Core's own layout of these: padded for ZeRO's shares, or without holes."""
    if ddp.use_distributed_optimizer:
        return DistributedOptimizer.compute_full_param_layout(
            parameters, bucket_size, ranks, ddp, expert_data_parallel_world_size=expert_ranks
        )
    groups = group_params_for_buffers(parameters, ddp.grad_reduce_in_fp32)
    layouts: dict[object, PerBufferParamLayout] = {
        key: _compute_default_per_buffer_param_layout(members, bucket_size)
        for key, (members, _) in groups.items()
    }
    return FullParamLayout(layouts=layouts)


__all__ = ["bucket_size", "layout"]
