"""What a rank holds of the run's state, as pieces of global tensors: weights, buffers, optimizer state.

Names: `weights/NAME` for the model's tensors under megatron-core's global names (`sharded_state_dict`), and
`optimizer/STATE/NAME` for `main` (FP32 master weights) and each moment, with the weight's name and shape. So
a checkpoint knows nothing of layouts, of DDP's buffers or of ZeRO's cuts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from dsplugins import optimizer_groups, weights
from dsplugins.checkpoint.boxes import boxes
from dsplugins.model import bare


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor, in this rank's memory."""

    name: str
    shape: tuple[int, ...]
    """Of the global tensor."""
    offsets: tuple[int, ...]
    """Where the box starts in it."""
    data: torch.Tensor
    """The box: a view of live memory with as many dimensions as `shape`."""
    main: bool
    """Whether this model-parallel rank writes it; others hold the very same values."""


def pieces(chunks: Sequence[torch.nn.Module], optimizer: Any) -> list[Piece]:
    """Everything that this rank has to save, or to fill when it loads."""
    return [*weight_pieces(chunks), *_optimizer(chunks, optimizer, _shards(chunks))]


def weight_pieces(chunks: Sequence[torch.nn.Module]) -> list[Piece]:
    """The model's tensors alone."""
    return [*map(_weight, _shards(chunks))]


def _shards(chunks: Sequence[torch.nn.Module]) -> list[ShardedTensor]:
    return [shard for chunk in chunks for shard in weights.shards(bare(chunk)) if shard.data is not None]


def optimizer_steps(chunks: Sequence[torch.nn.Module], optimizer: Any) -> int:
    """Updates that the optimizer has made; the same for all parameters. Raises ValueError if it isn't."""
    found = {int(step) for step in _counters(chunks, optimizer)}
    if len(found) > 1:
        raise ValueError(f"parameters were updated differently often: {sorted(found)}")
    return found.pop() if found else 0


def set_optimizer_steps(chunks: Sequence[torch.nn.Module], optimizer: Any, steps: int) -> None:
    """The counterpart of `optimizer_steps`."""
    for counter in _counters(chunks, optimizer):
        counter.fill_(steps)


def _counters(chunks: Sequence[torch.nn.Module], optimizer: Any) -> Iterator[torch.Tensor]:
    for place in optimizer_groups.placements(optimizer, chunks):
        if "step" in place.state:
            yield place.state["step"]


def _weight(shard: ShardedTensor) -> Piece:
    data = shard.data.detach()
    box = data.reshape(_local_shape(shard)) if data.is_contiguous() else data
    return Piece(f"weights/{shard.key}", tuple(shard.global_shape), _offsets(shard), box, _is_main(shard))


def _optimizer(
    chunks: Sequence[torch.nn.Module], optimizer: Any, shards: Sequence[ShardedTensor]
) -> Iterator[Piece]:
    """Each share of main weights and moments, cut into boxes of the weight's global tensor."""
    owned = _by_parameter(chunks, shards)
    for place in optimizer_groups.placements(optimizer, chunks):
        tensors = {"main": place.main} | {k: v for k, v in place.state.items() if k != "step"}
        for shard, begin in owned[place.parameter]:
            first = max(place.start, begin)
            last = min(place.stop, begin + shard.data.numel())
            if first >= last:
                continue
            for state, tensor in tensors.items():
                flat = tensor.detach().view(-1)[first - place.start : last - place.start]
                yield from _cut(f"optimizer/{state}/{shard.key}", shard, flat, first - begin)


def _cut(name: str, shard: ShardedTensor, flat: torch.Tensor, start: int) -> Iterator[Piece]:
    """`flat` holds elements from `start` on of the shard: as boxes of the global tensor."""
    done, base = 0, _offsets(shard)
    for offsets, sizes in boxes(_local_shape(shard), start, start + flat.numel()):
        count = math.prod(sizes)
        where = tuple(a + b for a, b in zip(base, offsets, strict=True))
        data = flat[done : done + count].view(sizes)
        yield Piece(name, tuple(shard.global_shape), where, data, _is_main(shard))
        done += count


def _by_parameter(
    chunks: Sequence[torch.nn.Module], shards: Sequence[ShardedTensor]
) -> dict[torch.nn.Parameter, list[tuple[ShardedTensor, int]]]:
    """Parameter -> its shards, each with the element of the parameter at which it begins."""
    found: dict[torch.nn.Parameter, list[tuple[ShardedTensor, int]]] = {}
    begins = {id(shard): shard.data.data_ptr() for shard in shards}
    for parameter in optimizer_groups.parameter_names(chunks):
        size, start = parameter.element_size(), parameter.data_ptr()
        inside = [
            (shard, (begins[id(shard)] - start) // size)
            for shard in shards
            if start <= begins[id(shard)] < start + parameter.numel() * size
        ]
        held = sum(shard.data.numel() for shard, _ in inside)
        whole = held == parameter.numel() and all(shard.data.is_contiguous() for shard, _ in inside)
        assert whole, f"sharded_state_dict shows {held} of {parameter.numel()} elements of a parameter"
        found[parameter] = inside
    return found


def _local_shape(shard: ShardedTensor) -> tuple[int, ...]:
    return (1,) * shard.prepend_axis_num + tuple(shard.local_shape)


def _offsets(shard: ShardedTensor) -> tuple[int, ...]:
    return tuple(int(offset) for offset in shard.global_offset)


def _is_main(shard: ShardedTensor) -> bool:
    """Whether all of a shard's replica numbers are 0 but the last one, which counts data-parallel copies."""
    replica = shard.replica_id if isinstance(shard.replica_id, tuple) else (shard.replica_id,)
    return not any(replica[:-1])


__all__ = ["Piece", "optimizer_steps", "pieces", "set_optimizer_steps", "weight_pieces"]
