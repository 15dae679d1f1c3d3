"""Pieces in the terms of torch's distributed checkpoints (DCP): who writes which box, and who reads it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import planner_helpers
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dsplugins.checkpoint.pieces import Piece

Place = tuple[str, tuple[int, ...]]


class Unfit(ValueError):
    """A checkpoint doesn't hold what this run needs, or holds more."""


class PieceSaver(DefaultSavePlanner):
    """Writes pieces; what several ranks hold is written by one of them, which DCP chooses by size."""

    def __init__(self, held: Iterable[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._held = _by_place(piece for piece in held if piece.main)

    def create_local_plan(self) -> SavePlan:
        """One write item for each box."""
        self.plan = SavePlan([_write_item(piece) for piece in self._held.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The box's values."""
        index = write_item.index
        assert index.offset is not None
        return self._held[index.fqn, tuple(index.offset)].data


class PieceLoader(DefaultLoadPlanner):
    """Fills pieces from whatever boxes the checkpoint holds. Raises Unfit before anything is read."""

    def __init__(self, held: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._held = _by_place(held)

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keeps the checkpoint's table of contents."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        self._contents = metadata.state_dict_metadata

    def stored(self) -> list[str]:
        """Names of all tensors in the checkpoint, sorted."""
        return sorted(self._contents)

    def wanted(self) -> set[str]:
        """Names of the tensors of which this rank holds a piece."""
        return {name for name, _ in self._held}

    def create_local_plan(self) -> LoadPlan:
        """The reads that fill every piece of this rank completely."""
        by_name: dict[str, list[Piece]] = defaultdict(list)
        for piece in self._held.values():
            by_name[piece.name].append(piece)
        items = [item for name, held in by_name.items() for item in self._reads(name, held)]
        return LoadPlan(items)

    def _reads(self, name: str, held: Sequence[Piece]) -> list[ReadItem]:
        stored = self._contents.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise Unfit(f"{name} is not in it")
        if tuple(stored.size) != held[0].shape:
            raise Unfit(f"{name} is {list(stored.size)} there and {list(held[0].shape)} here")
        if stored.properties.dtype != held[0].data.dtype:
            raise Unfit(f"{name} is {stored.properties.dtype} there and {held[0].data.dtype} here")
        reads = planner_helpers.create_read_items_for_chunk_list(name, stored, [_chunk(p) for p in held])
        found = sum(math.prod(read.lengths) for read in reads)
        wanted = sum(piece.data.numel() for piece in held)
        if found != wanted:
            raise Unfit(f"{name}: {found} of {wanted} elements are in it")
        return reads

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of a piece that this read fills."""
        index = read_item.dest_index
        assert index.offset is not None
        data = self._held[index.fqn, tuple(index.offset)].data
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            data = data.narrow(axis, offset, length)
        return data

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing: `resolve_tensor` gave the memory itself."""


def _by_place(held: Iterable[Piece]) -> dict[Place, Piece]:
    """Each piece by name and position. Raises Unfit where this rank holds the same box twice."""
    found: dict[Place, Piece] = {}
    for piece in held:
        place = (piece.name, piece.offsets)
        if place in found:
            raise Unfit(f"a rank holds {piece.name} at {list(piece.offsets)} twice: one would not be filled")
        found[place] = piece
    return found


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.data.size())


def _write_item(piece: Piece) -> WriteItem:
    data = TensorWriteData(
        chunk=_chunk(piece),
        properties=TensorProperties(dtype=piece.data.dtype),
        size=torch.Size(piece.shape),
    )
    index = MetadataIndex(piece.name, torch.Size(piece.offsets))
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


__all__ = ["PieceLoader", "PieceSaver", "Unfit"]
