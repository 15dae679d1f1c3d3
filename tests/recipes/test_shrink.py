"""The 671B files themselves train, once sizes, platform, layout and lengths of schedules are overridden."""

from __future__ import annotations

import math

import pytest
import shrunk

LAYOUT = (
    "parallel={pipeline: 2, expert: 2}",
    "model.pipeline_model_parallel_layout=Et|ttmL",
    "train.micro_batch=2",
    "run.world_size=4",
)
# Every phase of the report at a 10^-10th of its tokens, with the report's rates. Batches are a size.
LENGTHS = (
    "train.tokens=1480",
    "train.global_batch=[{until: 47, from: 4, to: 8}, {value: 8}]",
    "train.learning_rate=[{until: 2 steps, from: 0, to: 2.2e-4}, {until: 1000, value: 2.2e-4},"
    " {until: 1430, to: 2.2e-5, shape: cosine}, {until: 1463, value: 2.2e-5}, {value: 7.3e-6}]",
    "plugins.aux_free.update_rate=[{until: 1430, value: 0.001}, {value: 0.0}]",
    "plugins.mtp.weight=[{until: 1000, value: 0.3}, {value: 0.1}]",
)
OVERRIDES = (*shrunk.SIZES, shrunk.PLATFORM, *LAYOUT, *LENGTHS)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [(shrunk.RECIPE, ()), ("deepseek_v3/v3_671b_fp8.yaml", ("plugins.fp8_v3.backend=reference",))],
)
def test_the_671b_recipe_trains_on_four_processes(workers, recipe, more):
    results = workers(4).run(shrunk.stepped, (*OVERRIDES, *more), recipe)
    losses = results[0]["losses"]
    assert all(result["losses"] == losses for result in results), "every rank knows every number"
    assert all(math.isfinite(number) for step in losses for number in step)
    main, mtp, *_ = zip(*losses, strict=True)
    for loss in (main, mtp):
        assert abs(loss[0] - math.log(264)) < 0.05, "an untrained model knows nothing of 264 tokens"
        assert sum(loss[-4:]) / 4 < sum(loss[:4]) / 4 - 0.02
    assert len(losses) == 13
    assert results[0]["trained"] != results[3]["trained"], "stages and experts are divided among ranks"
