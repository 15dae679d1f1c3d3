"""What is predicted from sizes alone is what two ranks count, in every layout of two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

CASES: dict[str, list[str]] = {
    "dp2": [],
    "dp2, bf16": ["plugins.fp32=null", "plugins.bf16={}"],
    "dp2, gathered late, in buckets": [
        "plugins.adamw.overlap_grad_reduce=true",
        "plugins.adamw.overlap_param_gather=true",
        "ddp.bucket_size=4000",
    ],
    "ep2, no zero": ["parallel.expert=2", "plugins.adamw.zero=false"],
    "ep2": ["parallel.expert=2"],
    "ep2, in fp8": ["parallel.expert=2", "plugins.alltoall=null", "plugins.fp8_alltoall={}"],
    "ep2, allgather": ["parallel.expert=2", "plugins.alltoall=null", "plugins.allgather={}"],
    "tp2": ["parallel.tensor=2", "plugins.aux_free.sequence_loss=0.0"],
    "tp2, ep2": ["parallel.tensor=2", "parallel.expert=2", "plugins.aux_free.sequence_loss=0.0"],
    "pp2": ["parallel.pipeline=2"],
    "pp2 x vpp2": [
        *("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
        *("plugins.one_f_one_b=null", "plugins.interleaved={}"),
    ],
}
UNEVEN = {("all_to_all", "expert")}
LOOP = ("all_reduce", "world")
FLAGS = 8
"""Bytes of the two flags that the loop sends after a step, which these steps don't have."""


def told_and_counted(overrides: list[str]) -> tuple[dict[Any, float], dict[Any, float], bool]:
    """Payload by (kind, group) of the second step, on this rank; whether the third one went uncounted."""
    from runs import assembled

    from dsplugins.plugins.event.wire.prediction import Rank, bare, predict
    from dsplugins.plugins.event.wire.tally import Tally
    from dsplugins.step import Progress, take_step

    with assembled(["train.micro_batch=2", *overrides]) as run:
        from megatron.core import parallel_state

        stage = parallel_state.get_pipeline_model_parallel_rank()
        rank = Rank(run.plan, run.settings, [bare(chunk) for chunk in run.chunks], stage)
        progress, tally = Progress(), Tally()
        progress = progress.after(take_step(run, progress))
        tally.start()
        step = take_step(run, progress)
        batch = step.global_batch
        counted = {tuple(key): traffic.payload for key, traffic in tally.stop().items()}
        take_step(run, progress.after(step))
        later = {tuple(key): traffic.payload for key, traffic in tally.traffic.items()}
    told = predict(rank, batch // run.plan.layout.data // run.plan.train.micro_batch)
    return {tuple(key): payload for key, payload in told.items()}, counted, later == counted


@pytest.mark.parametrize("case", CASES)
def test_prediction_is_measurement(workers, case):
    ranks = workers(2).run(told_and_counted, CASES[case])
    for told, counted, still in ranks:
        assert still, "nothing is counted after the end"
        assert told[LOOP] == counted[LOOP] + FLAGS
        assert set(told) == set(counted)
        for key in set(told) - UNEVEN - {LOOP}:
            assert told[key] == counted[key], key
    for key in UNEVEN & set(ranks[0][0]):
        told, counted = (sum(rank[i][key] for rank in ranks) for i in (0, 1))
        assert told == counted > 0, key


SLOTS = {"attention": "mla", "backend": "torch_local", "precision": "bf16"}


@pytest.mark.parametrize(
    ("slots", "sizes"),
    [
        (SLOTS | {"attention": "gqa"}, {}),
        (SLOTS | {"backend": "te"}, {}),
        (SLOTS | {"precision": "fp8_v3"}, {}),
        (SLOTS | {"recompute": "v3_recompute"}, {}),
        (SLOTS, {"expert_tensor": 2}),
    ],
)
def test_what_has_no_formula_is_left_out_whole(slots, sizes):
    """Half of a row would look like a wrong prediction."""
    from dsplugins.contracts import Layout
    from dsplugins.plugins.event.wire.prediction import Rank
    from dsplugins.plugins.event.wire.tensor import replicated_gradients, tensor_parallel

    plan: Any = SimpleNamespace(layout=Layout(world_size=2, tensor=2, **sizes), slots=slots)
    settings: Any = SimpleNamespace(model=SimpleNamespace(q_lora_rank=16))
    rank = Rank(plan, settings, [], stage=0)
    assert list(tensor_parallel(rank)) == [] and replicated_gradients(rank) == 0
