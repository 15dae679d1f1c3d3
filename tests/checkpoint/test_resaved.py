"""From any layout into any other and out again: no bit of a checkpoint changes, experts packed or not."""

from __future__ import annotations

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


def resaved(sources, targets, overrides):
    """Load each checkpoint into one model of this layout, and save it; what was left out."""
    import torch.distributed as dist
    from runs import assembled

    from dsplugins.checkpoint import store
    from dsplugins.checkpoint.pieces import pieces

    left = []
    with assembled([*overrides, *FEW, "train.steps=9", "model.init_method_std=0.2"]) as run:
        held = pieces(run.chunks, run.optimizer)
        for source, target in zip(sources, targets, strict=True):
            for piece in held:
                piece.data.fill_(-7)
            found, damaged = store.newest_good(Path(source), dist.group.WORLD)
            assert not damaged
            left += store.load(found, held, dist.group.WORLD)
            store.save(Path(target), STEP, held, {}, dist.group.WORLD)
    return left


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
    """Layout -> folder with its checkpoint, and the digests there."""
    folders = {name: tmp_path_factory.mktemp(name) for name in LAYOUTS}
    for name, (size, overrides) in LAYOUTS.items():
        workers(size).run(trained, str(folders[name]), overrides)
    return {name: (folder, digests(folder)) for name, folder in folders.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit_goes_through(workers, sources, tmp_path, layout):
    size, overrides = LAYOUTS[layout]
    targets = {name: tmp_path / name for name in LAYOUTS}
    given = [str(source) for source, _ in sources.values()], list(map(str, targets.values()))
    assert workers(size).run(resaved, *given, overrides) == [[]] * size
    for name, (_, before) in sources.items():
        assert len(before) > 100 and digests(targets[name]) == before, f"{name} -> {layout}"
