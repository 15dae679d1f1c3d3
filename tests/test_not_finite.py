"""A loss that is not finite stops the run with a dump, or costs one update, as the recipe says."""

from __future__ import annotations

import json
import math

import pytest

from dsplugins.testing import JobFailed


def poisoned(folder, policy):
    """Train four steps; the gradients of the third one are not finite on the last rank only."""
    from pathlib import Path

    import torch
    from runs import assembled

    from dsplugins.recipe import Recipe
    from dsplugins.rundir import RunDirectory
    from dsplugins.show import Display
    from dsplugins.train import Loop
    from dsplugins.wishes import Wishes

    class Loops(Loop):
        def _finish(self, done):
            pass

    overrides = [f"train.not_finite={policy}", "train.steps=4", "evaluate.sequences=0", "save.every=1"]
    with assembled(overrides) as run:
        taken, model = [], run.chunks[0].module
        forward_backward = run.forward_backward

        def third_is_harmed(**kwargs):
            losses = forward_backward(**kwargs)
            taken.append(1)
            if len(taken) == 3 and run.rank == torch.distributed.get_world_size() - 1:
                for parameter in model.parameters():
                    parameter.main_grad.fill_(math.inf)
            return losses

        object.__setattr__(run, "forward_backward", third_is_harmed)
        loaded = Recipe.load(str(Path(__file__).parent / "tiny.yaml"), [])
        before = [p.detach().clone() for p in model.parameters()]
        loop = Loops(run, RunDirectory(Path(folder)), Display(speaks=False), Wishes())
        loop.run(loaded)
        after = list(model.parameters())
        assert all(bool(p.isfinite().all()) for p in after)
        return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_skip_leaves_one_update_out(workers, tmp_path):
    assert workers(2).run(poisoned, str(tmp_path), "skip") == [True, True]
    assert [row["skipped"] for row in rows(tmp_path)] == [False, False, True, False]
    assert rows(tmp_path)[2]["grad_norm"] is None and rows(tmp_path)[3]["grad_norm"] > 0


def test_stop_names_the_dump_and_the_last_good_checkpoint(workers, tmp_path):
    with pytest.raises(JobFailed, match="step 3: .*last good checkpoint: .*step-00000002"):
        workers(2).run(poisoned, str(tmp_path), "stop")
    folder = tmp_path / "not_finite" / "step-00000003"
    dumps = [json.loads(file.read_text()) for file in sorted(folder.iterdir())]
    assert len(dumps) == 2 and dumps[0]["training_samples"] == [16, 24]
    assert any("output_layer.weight" in name for each in dumps for name in each["gradients_not_finite"])
