"""Micro-batches and the loss: what is logged does not depend on how a batch is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def numbered(index: int) -> torch.Tensor:
    """A sample that tells its index."""
    return torch.full((5,), index)


@pytest.mark.parametrize(("ranks", "size"), [(1, 8), (2, 2), (4, 1)])
def test_every_sample_of_a_step_comes_once(single, ranks, size):
    from dsplugins.batches import micro_batches

    count, seen = 8 // (ranks * size), []
    for rank in range(ranks):
        for tokens, labels, positions in micro_batches(numbered, 24, count, size, rank, ranks, "cpu"):
            assert tokens.shape == labels.shape == positions.shape == (size, 4)
            assert positions.tolist() == [[0, 1, 2, 3]] * size
            seen += tokens[:, 0].tolist()
    assert sorted(seen) == list(range(24, 32))


def test_the_logged_loss_survives_cores_division(single):
    """Core divides a micro-batch's loss in place by their number; a view of it would be logged too small."""
    from dsplugins.batches import mean_loss

    output = torch.tensor([[1.0, 3.0], [5.0, 7.0]], requires_grad=True)
    loss, logged = mean_loss(output)
    with torch.no_grad():
        loss /= 4
    assert loss.item() == 1.0 and logged["loss"].item() == 4.0
    assert not logged["loss"].requires_grad


def one_step(size: int) -> dict[str, Any]:
    """A step of 8 sequences in micro-batches of `size`, and what the routers hold afterwards."""
    from runs import assembled

    from dsplugins import routers
    from dsplugins.step import Progress, take_step

    with assembled([f"train.micro_batch={size}", "plugins.aux_free.sequence_loss=0.5"]) as run:
        step = take_step(run, Progress())
        left = [router.local_tokens_per_expert.sum().item() for _, router in routers.local(run.chunks)]
    counts = step.expert_counts.tolist()
    return {
        "numbers": (step.loss, step.mtp_loss, step.aux_loss, step.grad_norm),
        "counts": counts,
        "left": left,
    }


def test_numbers_do_not_depend_on_the_micro_batch(workers):
    one, two, eight = (workers(1).run(one_step, size)[0] for size in (1, 2, 8))
    for other in (two, eight):
        assert other["numbers"] == pytest.approx(one["numbers"], rel=1e-5)
        assert other["counts"] == one["counts"]


def test_counts_are_read_before_they_are_cleared(workers):
    """Core clears them where it moves biases itself, inside gradient finalisation: it is told not to."""
    (found,) = workers(1).run(one_step, 4)
    assert [sum(layer) for layer in found["counts"]] == [8 * 32 * 2] * 4
    assert found["left"] == [0.0] * 4, "the next step starts anew"


def ramp(world, *more):
    """Batches of the first steps of a ramp that 8 and 16 sequences both divide at its ends."""
    from runs import TINY

    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.step import Progress

    ramped = "train.global_batch=[{until: 10 steps, from: 16, to: 64}, {value: 64}]"
    loaded = Recipe.load(
        TINY, [ramped, "train.micro_batch=1", "evaluate.sequences=0", f"run.world_size={world}", *more]
    )
    _, plan = prepare(loaded)
    unit = plan.train.micro_batch * plan.layout.data
    multiple = plan.train.multiple(unit)
    return [plan.train.global_batch.at_multiple(Progress(step).steps, 0, multiple) for step in range(10)]


def test_a_ramp_takes_the_same_steps_in_every_layout_that_divides_its_multiple(single):
    assert ramp(8) != ramp(16)
    assert ramp(8, "train.batch_multiple=16") == ramp(16, "train.batch_multiple=16") == ramp(16)


def test_a_multiple_that_the_layout_does_not_divide_is_refused(single):
    from dsplugins.contracts import RecipeError

    with pytest.raises(RecipeError, match="batch_multiple=12 is not a multiple of .* = 8"):
        ramp(8, "train.batch_multiple=12")
