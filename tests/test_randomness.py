"""What a plugin draws in a step depends on the step, not on where a run went on."""

from __future__ import annotations


def drawn(overrides, steps):
    """What would be drawn on this rank in each of `steps`: by the model's first module, and by a router."""
    import torch
    from runs import assembled

    from dsplugins import routers
    from dsplugins.step import Progress, take_step

    with assembled(overrides) as run:
        first, in_router = [], []
        run.chunks[0].register_forward_pre_hook(lambda *_: first.append(float(torch.rand(()))))
        _, router = next(iter(routers.local(run.chunks)))
        router.register_forward_hook(lambda *_: in_router.append(float(torch.rand(()))))
        found, sequences = [], run.plan.train.global_batch.at(0, 0)
        for step in steps:
            first.clear(), in_router.clear()
            take_step(run, Progress(step - 1, (step - 1) * int(sequences), 0))
            found.append((first[0], in_router[0]))
    return found


def test_a_step_draws_the_same_wherever_the_run_began(workers):
    through = workers(1).run(drawn, [], [1, 2, 3])[0]
    assert workers(1).run(drawn, [], [3])[0] == through[2:]
    assert len({number for pair in through for number in pair}) == 6
    assert workers(1).run(drawn, ["train.seed=7"], [1])[0] != through[:1]


def test_ranks_with_other_samples_draw_other_numbers(workers):
    one, other = workers(2).run(drawn, [], [1])
    assert one[0][0] != other[0][0]


def test_tensor_parallel_ranks_draw_the_same_where_they_hold_the_same(workers):
    (one,), (other,) = workers(2).run(drawn, ["parallel.tensor=2", "train.micro_batch=2"], [1])
    assert one[0] == other[0], "the embedding's input is the same"
    assert one[1] != other[1], "under sequence parallelism each has tokens of its own: core's tracker"
