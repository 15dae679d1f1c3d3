"""A run that goes on is looked at once more: loading can change what the first audit saw."""

from __future__ import annotations

from pathlib import Path

BF16 = ["plugins.fp32=null", "plugins.bf16={}", "plugins.adamw.moments=bf16", "train.steps=3"]


def begun_again(folder, widened):
    """Save after a step, load into the same model, with moments `widened` or not; what the start says."""
    from runs import TINY, assembled

    from dsplugins.audit import AuditFailure
    from dsplugins.checkpoint import store
    from dsplugins.optimizer_groups import placements
    from dsplugins.recipe import Recipe
    from dsplugins.rundir import RunDirectory
    from dsplugins.show import Display
    from dsplugins.step import Progress, take_step
    from dsplugins.train import Loop
    from dsplugins.wishes import Wishes

    with assembled(BF16) as run:
        load, recipe, directory = store.load, Recipe.load(str(TINY), []), RunDirectory(Path(folder))

        def widening(*given):
            left = load(*given)
            for place in placements(run.optimizer, run.chunks) if widened else ():
                place.state["exp_avg_sq"] = place.state["exp_avg_sq"].float()
            return left

        loop = Loop(run, directory, Display(speaks=False), Wishes())
        loop._begin(recipe, False, False)
        loop.saver.save(Progress().after(take_step(run, Progress())))
        loop.saver.close()
        store.load = widening
        try:
            again = Loop(run, directory, Display(speaks=False), Wishes())
            return again._begin(recipe, False, False).steps
        except AuditFailure as failure:
            return failure.differences
        finally:
            store.load = load


def test_what_was_loaded_keeps_its_formats(workers, tmp_path):
    assert workers(1).run(begun_again, str(tmp_path / "good"), False) == [1]
    (said,) = workers(1).run(begun_again, str(tmp_path / "wide"), True)
    assert said and all("keeps moments in bfloat16 and float32, chosen was bfloat16" in each for each in said)
