"""A loss that is not finite stops the run with a dump, or costs one update, as the recipe says."""

from __future__ import annotations

import json
import math

import pytest

from dsplugins.testing import JobFailed


def poisoned(folder, policy, harmed=(3,), save_fails=False, what="gradient"):
    """Train to one step after the last of `harmed`, in which `what` is not finite on the last rank only."""
    from pathlib import Path

    import torch
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from runs import assembled

    from dsplugins.contracts import EnvironmentUnfit
    from dsplugins.recipe import Recipe
    from dsplugins.rundir import RunDirectory
    from dsplugins.show import Display
    from dsplugins.train import Loop
    from dsplugins.wishes import Wishes

    def harm(*outputs):
        """Gradients stay finite where losses are not."""
        if len(taken) + 1 not in harmed or run.rank != torch.distributed.get_world_size() - 1:
            return None
        if what == "mtp_loss":
            MTPLossLoggingHelper.tracker["loss_values"] += math.inf
        return outputs[-1] + math.inf if what == "loss" else None

    def failing():
        raise EnvironmentUnfit("checkpoint of step 2: no room")

    class Loops(Loop):
        def _finish(self, done):
            pass

    overrides = [
        f"train.not_finite={policy}",
        f"train.steps={harmed[-1] + 1}",
        "evaluate.sequences=0",
        "save.every=1",
    ]
    with assembled(overrides) as run:
        taken, model = [], run.chunks[0].module
        forward_backward = run.forward_backward

        def some_are_harmed(**kwargs):
            losses = forward_backward(**kwargs)
            taken.append(1)
            if len(taken) in harmed and run.rank == torch.distributed.get_world_size() - 1:
                for parameter in model.parameters() if what == "gradient" else ():
                    parameter.main_grad.fill_(math.inf)
            return losses

        object.__setattr__(run, "forward_backward", some_are_harmed)
        run.chunks[0].register_forward_hook(harm)
        loaded = Recipe.load(str(Path(__file__).parent / "tiny.yaml"), [])
        before = [p.detach().clone() for p in model.parameters()]
        loop = Loops(run, RunDirectory(Path(folder)), Display(speaks=False), Wishes())
        if save_fails:
            loop.saver.close = failing
        loop.run(loaded)
        after = list(model.parameters())
        assert all(bool(p.isfinite().all()) for p in after)
        return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def dumps(folder, step):
    """Of all ranks."""
    files = sorted((folder / "not_finite" / f"step-{step:08d}").iterdir())
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("what", ["loss", "mtp_loss"])
def test_skip_leaves_out_a_step_whose_loss_alone_is_not_finite(workers, tmp_path, what):
    workers(2).run(poisoned, str(tmp_path), "skip", (1,), False, what)
    assert [row["skipped"] for row in rows(tmp_path)] == [True, False]
    assert rows(tmp_path)[0][what] is None and rows(tmp_path)[1][what] > 0
    assert not any(one["gradients_not_finite"] for one in dumps(tmp_path, 1))


def test_skip_leaves_one_update_out(workers, tmp_path):
    assert workers(2).run(poisoned, str(tmp_path), "skip") == [True, True]
    assert [row["skipped"] for row in rows(tmp_path)] == [False, False, True, False]
    assert rows(tmp_path)[2]["grad_norm"] is None and rows(tmp_path)[3]["grad_norm"] > 0
    assert len(dumps(tmp_path, 3)) == 2 and len(list((tmp_path / "not_finite").iterdir())) == 1


def test_skipped_steps_leave_a_few_dumps(workers, tmp_path):
    workers(2).run(poisoned, str(tmp_path), "skip", (1, 2, 3, 4, 5, 6))
    assert [row["skipped"] for row in rows(tmp_path)] == [True] * 6 + [False]
    assert [len(dumps(tmp_path, step)) for step in (1, 2, 3)] == [2, 2, 2]
    assert len(list((tmp_path / "not_finite").iterdir())) == 3


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_dump_that_cannot_be_written_hides_nothing(workers, tmp_path, policy):
    (tmp_path / "not_finite").write_text("in the way")
    if policy == "skip":
        assert workers(2).run(poisoned, str(tmp_path), policy) == [True, True]
        return
    with pytest.raises(
        JobFailed, match="NotFinite: step 3: .*; no dump in .*: (Not a directory|File exists)"
    ):
        workers(2).run(poisoned, str(tmp_path), policy)


def test_a_save_that_failed_hides_nothing(workers, tmp_path):
    with pytest.raises(JobFailed, match="NotFinite: step 3: .*; checkpoint of step 2: no room"):
        workers(2).run(poisoned, str(tmp_path), "stop", (3,), True)


def test_stop_names_the_dump_and_the_last_good_checkpoint(workers, tmp_path):
    with pytest.raises(JobFailed, match="step 3: .*last good checkpoint: .*step-00000002"):
        workers(2).run(poisoned, str(tmp_path), "stop")
    found = dumps(tmp_path, 3)
    assert len(found) == 2 and found[0]["training_samples"] == [16, 24]
    assert any("output_layer.weight" in name for each in found for name in each["gradients_not_finite"])
