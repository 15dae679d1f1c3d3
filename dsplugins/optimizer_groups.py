"""Which parameter is in which group of an optimizer, and in which number formats it is kept.

Works on megatron-core's optimizer classes, whichever plugin built them: for the audit and checkpoints.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

STRAY = "(not in the model)"
"""Name of parameters that an optimizer holds and no module does."""


@dataclass(frozen=True)
class Placement:
    """Where this rank's share of one parameter is optimized."""

    name: str
    """`chunk.name`, such as `0.decoder.layers.1.mlp.router.weight`; layers count from 0 in a chunk."""
    parameter: torch.nn.Parameter
    """The model's own."""
    group: Mapping[str, Any]
    """Live param group of the torch optimizer: `lr`, `weight_decay`, ..."""
    main: torch.Tensor
    """What the torch optimizer updates: FP32; flat elements [start, stop) of the parameter."""
    state: Mapping[str, torch.Tensor]
    """Live state of `main`: `step`, `exp_avg`, `exp_avg_sq`. Empty before it is allocated."""
    start: int
    stop: int


@dataclass(frozen=True)
class Group:
    """One param group as the audit prints it. Counts are of this rank."""

    names: tuple[str, ...]
    """Parameters of which this rank optimizes at least a share."""
    elements: int
    """Elements that this rank optimizes."""
    weight_decay: float
    learning_rate_multiplier: float
    experts: bool
    """True for parameters whose gradients are summed over the expert-data-parallel group."""
    moments: tuple[str, ...]
    """Types of the moments, such as `("bfloat16",)`; empty before they are allocated."""
    master: tuple[str, ...]
    """Types of what is updated: `("float32",)`."""


def placements(optimizer: MegatronOptimizer, chunks: Sequence[torch.nn.Module]) -> list[Placement]:
    """Every share that this rank optimizes, in the optimizer's order."""
    names = parameter_names(chunks)
    found = []
    for part in leaves(optimizer):
        for parameter, group, main, start in _located(part):
            state = part.optimizer.state.get(main, {})
            stop = start + main.numel()
            name = names.get(parameter, STRAY)
            found.append(Placement(name, parameter, group, main, state, start, stop))
    return found


def describe(optimizer: MegatronOptimizer, chunks: Sequence[torch.nn.Module]) -> list[Group]:
    """All groups that hold anything on this rank."""
    by_group: dict[int, list[Placement]] = defaultdict(list)
    for place in placements(optimizer, chunks):
        by_group[id(place.group)].append(place)
    return [_summary(places) for places in by_group.values()]


def miscounted(optimizer: MegatronOptimizer, chunks: Sequence[torch.nn.Module]) -> dict[str, tuple[int, int]]:
    """Trainable parameters not optimized exactly once: name -> (elements optimized, elements there).

    Empty if all is well; what the optimizer holds and the model does not is under `STRAY`. Elements are
    summed over the ranks that share the optimizer's state, so with ZeRO this is collective over the
    data-parallel groups. The result is the same on all of them.
    """
    names = parameter_names(chunks)
    elements = {name: 0 for parameter, name in names.items() if parameter.requires_grad}
    for part in leaves(optimizer):
        owned = {names.get(parameter, STRAY): 0 for parameter in _responsible(part)}
        for parameter, _, main, _ in _located(part):
            owned[names.get(parameter, STRAY)] += main.numel()
        counts = torch.tensor(list(owned.values()), device=part.get_loss_scale().device)
        if isinstance(part, DistributedOptimizer):
            torch.distributed.all_reduce(counts, group=part.data_parallel_group)
        for name, count in zip(owned, counts.tolist(), strict=True):
            elements[name] = elements.get(name, 0) + count
    sizes = {name: parameter.numel() for parameter, name in names.items()} | {STRAY: 0}
    return {name: (count, sizes[name]) for name, count in elements.items() if count != sizes[name]}


def leaves(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """The wrappers that hold a torch optimizer; those of ranks without parameters are left out."""
    if isinstance(optimizer, ChainedOptimizer):
        for part in optimizer.chained_optimizers:
            yield from leaves(part)
    elif not optimizer.is_stub_optimizer:
        yield optimizer


def parameter_names(chunks: Sequence[torch.nn.Module]) -> dict[torch.nn.Parameter, str]:
    """Parameter -> `chunk.name`, without the prefixes of DDP and Float16Module."""
    names = {}
    for index, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            while name.startswith("module."):
                name = name.removeprefix("module.")
            names[parameter] = f"{index}.{name}"
    return names


_Located = tuple[torch.nn.Parameter, Mapping[str, Any], torch.Tensor, int]


def _located(part: MegatronOptimizer) -> Iterator[_Located]:
    """(model's parameter, group, main tensor, first flat element) of each share in one wrapper."""
    groups = part.optimizer.param_groups
    if isinstance(part, DistributedOptimizer):
        # Not by its `model_param_group_index_map`: that counts in buffer order, while the group lists
        # FP32 parameters first, so the two disagree for a group that holds both.
        pairs = (
            zip([*floats, *halves], [*float_shards, *mains], strict=True)
            for floats, halves, float_shards, mains in zip(
                part.model_fp32_groups,
                part.model_float16_groups,
                part.shard_fp32_groups,
                part.shard_fp32_from_float16_groups,
                strict=True,
            )
        )
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = (
            zip([*halves, *floats], [*mains, *floats], strict=True)
            for halves, mains, floats in zip(
                part.float16_groups, part.fp32_from_float16_groups, part.fp32_from_fp32_groups, strict=True
            )
        )
    else:
        pairs = (zip(group["params"], group["params"], strict=True) for group in groups)
    for group, members in zip(groups, pairs, strict=True):
        yield from ((parameter, group, main, _start(part, parameter)) for parameter, main in members)


def _start(part: MegatronOptimizer, parameter: torch.nn.Parameter) -> int:
    """First element of `parameter`, flattened, that this rank optimizes."""
    if isinstance(part, DistributedOptimizer):
        return part._get_model_param_range_map(parameter)["param"].start
    return 0


def _responsible(part: MegatronOptimizer) -> Iterator[torch.nn.Parameter]:
    """Parameters that the ranks sharing this wrapper's state optimize together."""
    if isinstance(part, DistributedOptimizer):
        for buffer in part.buffers:
            yield from buffer.params
    else:
        yield from (parameter for parameter, _, _, _ in _located(part))


def _summary(places: Sequence[Placement]) -> Group:
    """One group's numbers; all its places share the group."""
    group = places[0].group
    moments = {
        str(value.dtype).removeprefix("torch.")
        for place in places
        for key, value in place.state.items()
        if key != "step" and isinstance(value, torch.Tensor)
    }
    return Group(
        names=tuple(place.name for place in places),
        elements=sum(place.main.numel() for place in places),
        weight_decay=group["weight_decay"],
        learning_rate_multiplier=group.get("lr_mult", 1.0),
        experts=group.get("is_expert_parallel", False),
        moments=tuple(sorted(moments)),
        master=tuple(sorted({str(place.main.dtype).removeprefix("torch.") for place in places})),
    )
