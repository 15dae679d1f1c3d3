"""State goes through a checkpoint bit for bit, into the same layout and into others."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import SEQUENTIAL

from dsplugins.testing import JobFailed

LAYOUTS = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["parallel.tensor=2", *SEQUENTIAL]),
    "ep2": (2, ["parallel.expert=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2_vpp2": (
        2,
        [
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "plugins.one_f_one_b=null",
            "plugins.interleaved={}",
        ],
    ),
    "sequential": (1, SEQUENTIAL),
    "whole": (2, ["plugins.adamw.zero=false"]),
}
BF16 = ["plugins.fp32=null", "plugins.bf16={}", "plugins.adamw.moments=bf16"]


def saved(folder, overrides, steps, more=1):
    """Train `steps` steps, save, take `more`; the numbers of those."""
    import torch.distributed as dist
    from runs import assembled

    from dsplugins.checkpoint import store
    from dsplugins.checkpoint.pieces import optimizer_steps, pieces
    from dsplugins.step import Progress, take_step

    with assembled([*overrides, "train.steps=9"]) as run:
        progress = Progress()
        for _ in range(steps):
            progress = progress.after(take_step(run, progress))
        assert optimizer_steps(run.chunks, run.optimizer) == steps
        group = dist.group.WORLD
        store.save(Path(folder), steps, pieces(run.chunks, run.optimizer), {"step": steps}, group)
        return taken(run, progress, more)


def continued(folder, overrides, steps, more=1):
    """Load into a fresh model and take the next steps."""
    import torch.distributed as dist
    from runs import assembled

    from dsplugins.checkpoint import store
    from dsplugins.checkpoint.pieces import pieces, set_optimizer_steps
    from dsplugins.step import Progress

    with assembled([*overrides, "train.steps=9", "model.init_method_std=0.2"]) as run:
        found, damaged = store.newest_good(Path(folder), dist.group.WORLD)
        assert not damaged
        store.load(found, pieces(run.chunks, run.optimizer), dist.group.WORLD)
        set_optimizer_steps(run.chunks, run.optimizer, found.step)
        return taken(run, Progress(steps, steps * 8, steps * 8 * 32), more)


def taken(run, progress, more):
    """Of each step (loss, MTP's, gradient norm, expert counts)."""
    from dsplugins.step import take_step

    found = []
    for _ in range(more):
        step = take_step(run, progress)
        progress = progress.after(step)
        found.append((step.loss, step.mtp_loss, step.grad_norm, step.expert_counts.tolist()))
    return found


@pytest.fixture(scope="module")
def of_one(workers, tmp_path_factory):
    """A checkpoint of one process after two steps, and what its third step gave."""
    folder = tmp_path_factory.mktemp("one")
    return folder, workers(1).run(saved, str(folder), [], 2)[0][0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_one_process_goes_on_in_another_layout(workers, of_one, layout):
    folder, expected = of_one
    size, overrides = LAYOUTS[layout]
    for (found,) in workers(size).run(continued, str(folder), overrides, 2):
        assert found[3] == expected[3]
        if layout == "one":
            assert found == expected
        assert found[:3] == pytest.approx(expected[:3], rel=1e-5)


FOUR = ["train.micro_batch=2"]
EXPERTS = {
    "ep2, all held by each": (2, [*LAYOUTS["ep2"][1], *BF16, "plugins.adamw.zero=false"]),
    "pp2_vpp2": LAYOUTS["pp2_vpp2"],
    "dp2, cut by ZeRO, in buckets": (2, ["plugins.adamw.overlap_grad_reduce=true", "ddp.bucket_size=3000"]),
    "dp4, cut by ZeRO": (4, [*FOUR, *BF16]),
    "dp4, all held by each": (4, [*FOUR, "plugins.adamw.zero=false"]),
}
BOTH_WAYS = "dp4, cut by ZeRO"


@pytest.mark.parametrize(
    ("layout", "target"), [*((layout, "sequential") for layout in EXPERTS), (BOTH_WAYS, "grouped")]
)
def test_other_experts_go_on_bit_for_bit(workers, tmp_path, layout, target):
    """Losses, counts and norms of steps that clip, at rates that move weights."""
    size, overrides = EXPERTS[layout]
    overrides = [*overrides, "train.learning_rate=3.0e-3", "optimizer.clip_grad=0.5"]
    before, after = ([], SEQUENTIAL) if target == "sequential" else (SEQUENTIAL, [])
    expected = workers(size).run(saved, str(tmp_path), [*overrides, *before], 2, 3)
    assert all(norm > 0.5 for found in expected for _, _, norm, _ in found)
    assert workers(size).run(continued, str(tmp_path), [*overrides, *after], 2, 3) == expected


@pytest.mark.parametrize("layout", ["dp2", "tp2", "ep2", "pp2_vpp2"])
def test_bf16_moments_keep_every_bit_in_the_same_layout(workers, tmp_path, layout):
    size, overrides = LAYOUTS[layout]
    expected = workers(size).run(saved, str(tmp_path), [*overrides, *BF16], 2)
    assert workers(size).run(continued, str(tmp_path), [*overrides, *BF16], 2) == expected


@pytest.mark.parametrize(("source", "target"), [("tp2", "pp2"), ("ep2", "tp2"), ("pp2_vpp2", "ep2")])
def test_any_layout_goes_on_in_any_other(workers, tmp_path, source, target):
    (expected,) = workers(2).run(saved, str(tmp_path), LAYOUTS[source][1], 2)[0]
    for (found,) in workers(2).run(continued, str(tmp_path), LAYOUTS[target][1], 2):
        assert found[3] == expected[3]
        assert found[:3] == pytest.approx(expected[:3], rel=1e-5)


COMBINED = {
    "tp2_pp2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "ep2_pp2_vpp2": ["parallel.expert=2", *LAYOUTS["pp2_vpp2"][1], *FOUR],
    "tp2_ep2": ["parallel.tensor=2", "parallel.expert=2"],
}


@pytest.mark.parametrize(
    ("source", "target"),
    [("tp2_pp2", "ep2_pp2_vpp2"), ("ep2_pp2_vpp2", "tp2_ep2"), ("tp2_ep2", "tp2_pp2")],
)
def test_combined_layouts_go_on_in_others(workers, tmp_path, source, target):
    (expected,) = workers(4).run(saved, str(tmp_path), COMBINED[source], 2)[0]
    for (found,) in workers(4).run(continued, str(tmp_path), COMBINED[target], 2):
        assert found[3] == expected[3]
        assert found[:3] == pytest.approx(expected[:3], rel=1e-5)


def stopped_everywhere(folder, steps):
    """Of each step that a run may stop after: whether what follows its checkpoint is what followed it."""
    import torch.distributed as dist
    from runs import assembled

    from dsplugins.checkpoint import store
    from dsplugins.checkpoint.pieces import pieces
    from dsplugins.step import Progress

    with assembled(["train.steps=9"]) as run:
        progress, whole = Progress(), []
        for step in range(1, steps + 1):
            whole += taken(run, progress, 1)
            progress = Progress(step, step * 8, step * 8 * 32)
            held = pieces(run.chunks, run.optimizer)
            store.save(Path(folder) / str(step), step, held, {}, dist.group.WORLD)
    return [
        continued(Path(folder) / str(step), [], step, steps - step) == whole[step:]
        for step in range(1, steps)
    ]


def test_a_run_goes_on_bit_for_bit_from_any_of_its_steps(workers, tmp_path):
    assert workers(1).run(stopped_everywhere, str(tmp_path), 6) == [[True] * 5]


def test_other_moments_are_refused_by_name(workers, of_one):
    with pytest.raises(
        JobFailed, match="optimizer/exp_avg/.* is torch.float32 there and torch.bfloat16 here"
    ):
        workers(1).run(continued, str(of_one[0]), ["plugins.adamw.moments=bf16"], 2)
