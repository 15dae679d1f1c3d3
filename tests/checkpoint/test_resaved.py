"""From any layout into any other and out again: no bit of a checkpoint changes, experts packed or not."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import pytest
from checkpoint.test_state import LAYOUTS

STEP = 1
FEW = ["model.num_moe_experts=4", "model.moe_router_num_groups=2", "model.moe_router_group_topk=1"]


def trained(folder, overrides):
    """A checkpoint of a model that has taken a step: weights, biases and moments differ everywhere."""
    import torch.distributed as dist
    from runs import assembled

    from dsplugins.checkpoint import store
    from dsplugins.checkpoint.pieces import pieces
    from dsplugins.step import Progress, take_step

    with assembled([*overrides, *FEW, "train.steps=9"]) as run:
        take_step(run, Progress())
        store.save(Path(folder), STEP, pieces(run.chunks, run.optimizer), {}, dist.group.WORLD)


@contextlib.contextmanager
def reader(overrides):
    """A model of this layout, and what loads a checkpoint into it; its pieces are spoilt before."""
    import torch.distributed as dist
    from runs import assembled

    from dsplugins.checkpoint import store
    from dsplugins.checkpoint.pieces import pieces

    with assembled([*overrides, *FEW, "train.steps=9", "model.init_method_std=0.2"]) as run:
        held = pieces(run.chunks, run.optimizer)

        def load(folder):
            for piece in held:
                piece.data.fill_(-7)
            found, damaged = store.newest_good(Path(folder), dist.group.WORLD)
            assert not damaged and store.load(found, held, dist.group.WORLD) == []

        yield held, load


def resaved(source, target, overrides):
    """Load a checkpoint into a model of this layout, and save it."""
    import torch.distributed as dist

    from dsplugins.checkpoint import store

    with reader(overrides) as (held, load):
        load(source)
        store.save(Path(target), STEP, held, {}, dist.group.WORLD)


def other_than_the_first(folders, overrides):
    """Those checkpoints of which a rank reads any bit otherwise than of the first."""
    import torch

    with reader(overrides) as (held, load):
        load(folders[0])
        first = [piece.data.clone() for piece in held]
        found = []
        for folder in folders[1:]:
            load(folder)
            same = (torch.equal(piece.data, was) for piece, was in zip(held, first, strict=True))
            found += [] if all(same) else [folder]
        return found


def digests(folder):
    """Name -> type, shape and digest of every tensor in the checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp

    path = folder / f"step-{STEP:08d}"
    listed = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {name: torch.full(kept.size, -1, dtype=kept.properties.dtype) for name, kept in listed.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return {
        name: (
            str(tensor.dtype),
            tuple(tensor.shape),
            hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest(),
        )
        for name, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def sources(workers, tmp_path_factory):
    """Layout -> folder with a checkpoint that it has read from one process and written."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("trained", *LAYOUTS)}
    workers(1).run(trained, str(folders["trained"]), [])
    for name, (size, overrides) in LAYOUTS.items():
        workers(size).run(resaved, str(folders["trained"]), str(folders[name]), overrides)
    return folders


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_writes_what_it_read(sources, layout):
    before = digests(sources["trained"])
    assert len(before) > 100 and digests(sources[layout]) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_every_others(workers, sources, layout):
    size, overrides = LAYOUTS[layout]
    assert workers(size).run(other_than_the_first, list(map(str, sources.values())), overrides) == [[]] * size
