"""One rank's look at a run that stands on disk: its weights, in any layout, and an evaluation of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsplugins import blame, changes, process_group
from dsplugins.contracts import EnvironmentUnfit
from dsplugins.plan import prepare
from dsplugins.quiet import quiet

if TYPE_CHECKING:
    from dsplugins.assemble import Forward
    from dsplugins.checkpoint.store import Checkpoint
    from dsplugins.recipe import Recipe


def examine(recipe: Recipe, directory: Path, step: int | None = None) -> dict[str, Any]:
    """Evaluate the newest good checkpoint of the run in `directory`, or the one of `step`; collective.

    `recipe` may lay the model out differently than the run did. Nothing is written but the
    indexes that the data plugin makes of a corpus. Returns the checkpoint,
    the fields of Evaluation, the data's baselines, and how `recipe` and plugins differ from the run's.

    Raises EnvironmentUnfit where there is no such checkpoint, RecipeError where it doesn't fit the model.
    """
    quiet()
    plugins, plan = prepare(recipe)
    process_group.right_world(plan)
    platform, device = process_group.stand(plan, plugins)
    process_group.start(platform, plan)
    process_group.nodes_see(directory / "recipe.resolved.yaml")
    import torch

    from dsplugins.assemble import assemble_forward  # megatron-core, on a platform that is ready for it
    from dsplugins.evaluate import evaluate

    with blame.named(plugins):
        run = assemble_forward(recipe, plan, plugins, platform, device)
        found, told = _load_weights(run, directory / "checkpoints", step)
        saved = found.manifest()  # now: a run that is under way may remove it meanwhile
        evaluation = evaluate(run, found.step)
    other_data = map(str, changes.of_data(saved.get("data", {}), run.data.facts))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return {
        "checkpoint": str(found.path),
        **vars(evaluation),
        "sequences_asked": plan.evaluate.sequences,
        "baselines": dict(run.data.baselines()),
        "differences": [*map(str, changes.since(directory, recipe, plugins)), *other_data],
        "damaged": told,
    }


def _load_weights(run: Forward, folder: Path, step: int | None) -> tuple[Checkpoint, list[str]]:
    """Fill the model; the checkpoint, and what was wrong with newer ones."""
    import torch

    from dsplugins.checkpoint import store
    from dsplugins.checkpoint.pieces import weight_pieces

    group: Any = torch.distributed.new_group(backend="gloo")
    found, told = store.newest_good(folder, group, step)
    if found is None:
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        there = ", ".join(str(each.step) for each in store.finished(folder)) or "none"
        raise EnvironmentUnfit("; ".join([f"{folder} holds {wanted} that is whole (steps: {there})", *told]))
    store.load(found, weight_pieces(run.chunks), group)
    return found, told


__all__ = ["examine"]
