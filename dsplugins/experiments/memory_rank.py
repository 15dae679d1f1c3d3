"""One rank of `experiment memory`: `python -m ...memory_rank ANSWER RECIPE KEY=VALUE ...`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dsplugins import process_group
from dsplugins.plan import prepare
from dsplugins.quiet import quiet
from dsplugins.recipe import Recipe


def main(answer: Path, path: str, overrides: list[str]) -> None:
    """Take one step, look at what is there, and leave it as JSON; rank 0 writes."""
    quiet()
    recipe = Recipe.load(path, overrides)
    plugins, plan = prepare(recipe)
    platform, device = process_group.stand(plan, plugins)
    import torch

    from dsplugins import footprint
    from dsplugins.assemble import assemble
    from dsplugins.step import Progress, take_step

    run = assemble(recipe, plan, plugins, platform, device)
    take_step(run, Progress())
    state = footprint.measured(run.chunks, run.optimizer)
    found = {**vars(state), "state": state.total, "activations": activations(run)}
    if run.rank == 0:
        answer.write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def activations(run: Any) -> int:
    """Bytes that autograd holds for the backward of one micro-batch, of a run without a pipeline; collective.

    Each piece of memory counts once, weights not at all, and what recomputation has dropped has no bytes.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    from dsplugins.batches import forward_step, micro_batches

    (chunk,) = run.chunks
    train = run.plan.train
    batches = micro_batches(run.data.train, 0, 1, train.micro_batch, 0, run.plan.layout.data, run.device)
    held: dict[int, StorageWeakRef] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        reference = StorageWeakRef(tensor.untyped_storage())
        held[reference.cdata] = reference
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output, _ = forward_step(batches, chunk)
    weights = {parameter.untyped_storage()._cdata for parameter in chunk.parameters()}
    alive = [
        torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        for address, reference in held.items()
        if address not in weights and not reference.expired()
    ]
    del output
    return sum(storage.nbytes() for storage in alive if storage is not None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
