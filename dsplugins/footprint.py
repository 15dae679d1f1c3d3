"""Bytes of a rank's lasting state: weights, gradients, FP32 master weights, moments. No activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core import parallel_state

from dsplugins import optimizer_groups
from dsplugins.contracts import Settings
from dsplugins.model import bare


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank."""

    weights: int = 0
    gradients: int = 0
    main_weights: int = 0
    """What the optimizer updates, where that is not the weights themselves."""
    moments: int = 0

    @property
    def total(self) -> int:
        """All four."""
        return self.weights + self.gradients + self.main_weights + self.moments

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def expected(chunks: Sequence[torch.nn.Module], settings: Settings, moments: torch.dtype) -> Footprint:
    """From the shapes of this rank's bare chunks alone, which may be on `meta`; core's padding left out.

    With ZeRO-1 a rank keeps main weights and moments of its share: one in as many as there are copies of
    the parameter, which for experts are the expert-data-parallel ranks.
    """
    found = Footprint()
    for chunk in map(bare, chunks):
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                found += _of_parameter(parameter, settings, moments)
    return found


def _of_parameter(parameter: torch.nn.Parameter, settings: Settings, moments: torch.dtype) -> Footprint:
    count, ddp = parameter.numel(), settings.ddp
    owned = -(-count // _copies(parameter)) if settings.optimizer.use_distributed_optimizer else count
    return Footprint(
        weights=count * parameter.itemsize,
        gradients=count * (4 if ddp.grad_reduce_in_fp32 else parameter.itemsize),
        main_weights=0 if parameter.dtype == torch.float32 else owned * 4,
        moments=owned * 2 * moments.itemsize,
    )


def _copies(parameter: torch.nn.Parameter) -> int:
    """Ranks that hold the same parameter."""
    if getattr(parameter, "allreduce", True):
        return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))
    return int(parallel_state.get_expert_data_parallel_world_size())


def measured(chunks: Sequence[Any], optimizer: Any) -> Footprint:
    """Of the tensors that are there, padding included; moments are there after the first step."""
    places = optimizer_groups.placements(optimizer, chunks)
    weights = _storages(parameter for chunk in chunks for parameter in chunk.parameters())
    gradients = _storages(
        buffer.grad_data for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    )
    mains = _storages(place.main for place in places)
    moments = _storages(tensor for place in places for name, tensor in place.state.items() if name != "step")
    return Footprint(
        weights=sum(weights.values()),
        gradients=sum(gradients.values()),
        main_weights=sum(size for where, size in mains.items() if where not in weights),
        moments=sum(moments.values()),
    )


def largest(mine: Footprint, device: torch.device) -> Footprint:
    """The largest of each over all ranks; collective."""
    sizes = torch.tensor([getattr(mine, f.name) for f in fields(mine)], dtype=torch.int64, device=device)
    torch.distributed.all_reduce(sizes, op=torch.distributed.ReduceOp.MAX)
    return Footprint(*sizes.tolist())


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes of the memory behind tensors, each once however many views there are."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


__all__ = ["Footprint", "expected", "largest", "measured"]
