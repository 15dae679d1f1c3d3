"""The combined schedule trains what the plain ones train, two micro-batches at a time."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace
from unittest import mock

import pytest
from runs import SEQUENTIAL, trained

from dsplugins.contracts import Layout
from dsplugins.plugins.schedule.ep_overlap import EpOverlap
from dsplugins.plugins.schedule.interleaved import InterleavedOptions

BF16 = [
    *("plugins.fp32=null", "plugins.bf16={}"),
    *("train.steps=2", "train.micro_batch=1", "parallel.expert=2"),
]
OVERLAP = ["plugins.one_f_one_b=null", "plugins.ep_overlap={}"]
PIPELINE = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
FIELD = "overlap_moe_expert_parallel_comm"
NUMBERS = ("loss", "mtp_loss", "aux_loss", "grad_norm", "max_vio")


@contextlib.contextmanager
def watched(pairs):
    """Notes for each run of a chunk's plan whether there is a forward and a backward in it."""
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan

    run = TransformerModelChunkSchedulePlan.run

    def noted(forward, backward, **more):
        pairs.append((forward is not None, backward is not None))
        return run(forward, backward, **more)

    with mock.patch.object(TransformerModelChunkSchedulePlan, "run", staticmethod(noted)):
        yield


def overlapped(overrides):
    pairs = []
    with watched(pairs):
        found = trained([*BF16, *OVERLAP, *overrides])
    return found, pairs


def numbers(found):
    return [{key: row[key] for key in NUMBERS} for row in found["rows"]]


CASES = {
    "no pipeline": (2, ["plugins.mtp=null", *SEQUENTIAL], []),
    "recompute": (2, ["plugins.mtp=null", "plugins.v3_recompute.norms=false"], []),
    "interleaved": (4, PIPELINE, ["plugins.one_f_one_b=null", "plugins.interleaved={}"]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_that_of_the_schedule_inside(workers, case):
    size, overrides, plain = CASES[case]
    there = workers(size).run(trained, [*BF16, *overrides, *plain])[0]
    here, pairs = workers(size).run(overlapped, overrides)[0]
    assert numbers(here) == numbers(there)
    assert here["counts"] == there["counts"] and here["evaluation"] == there["evaluation"]
    assert pairs.count((True, True)) >= 3 * 2, "micro-batches were taken in pairs"


def test_with_mtp_embedding_and_head_get_their_gradients_in_two_sums(workers):
    """Core's plan runs MTP's backward by itself: what autograd adds up in BF16 elsewhere is added in FP32."""
    there = workers(2).run(trained, BF16)[0]
    here, pairs = workers(2).run(overlapped, [])[0]
    first, same = here["rows"][0], there["rows"][0]
    assert (first["loss"], first["mtp_loss"]) == (same["loss"], same["mtp_loss"])
    assert math.isclose(first["grad_norm"], same["grad_norm"], rel_tol=1e-5)
    for row, other in zip(here["rows"], there["rows"], strict=True):
        assert math.isclose(row["loss"], other["loss"], rel_tol=2**-8)  # a unit of BF16
    # 4 micro-batches a step: one forward alone, three pairs, one backward alone.
    step = [(True, False), *[(True, True)] * 3, (False, True)]
    assert pairs == step * 2


def problems(group=None, backend="torch_local", delay=False, **layout):
    plan = SimpleNamespace(layout=Layout(**layout), slots={"backend": backend})
    settings = SimpleNamespace(model=SimpleNamespace(delay_wgrad_compute=delay))
    found = EpOverlap(InterleavedOptions(group=group)).ds_check(plan=plan, settings=settings)
    return [problem.key for problem in found]


def test_what_would_be_ignored_is_refused():
    assert problems() == []
    assert problems(pipeline=2, virtual_pipeline=2, group=4) == []
    assert problems(group=4) == ["plugins.ep_overlap.group"]
    assert problems(pipeline=2) == ["parallel.virtual_pipeline"]
    assert problems(delay=True) == ["model.delay_wgrad_compute"]
    assert problems(delay=True, backend="te") == []


def test_a_single_micro_batch_has_nothing_to_hide_behind():
    schedule = EpOverlap(InterleavedOptions()).ds_schedule(plan=SimpleNamespace(layout=Layout()))
    assert "no other one" in schedule.refuses(1)
    assert schedule.refuses(2) is None and schedule.chunks == 1


REFUSED = {
    "parallel.expert=1": "only supported with expert model parallelism",
    "plugins.bf16=null plugins.fp32={}": "only supported with bf16 or fp16",
    "plugins.alltoall=null plugins.allgather={}": "alltoall/flex token dispatcher",
    "parallel.pipeline=2 run.world_size=4": "virtual_pipeline_model_parallel_size must be specified",
    "model.recompute_granularity=full": "recompute_granularity",
    "model.moe_shared_expert_overlap=true": "disable moe_shared_expert_overlap",
    f"plugins.ep_overlap=null plugins.one_f_one_b={{}} model.{FIELD}=true": "two writers",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_megatron_core_cannot_overlap_is_one_message(single, change):
    from runs import TINY

    from dsplugins.contracts import RecipeError
    from dsplugins.plan import prepare
    from dsplugins.recipe import Recipe
    from dsplugins.settings import settle

    recipe = Recipe.load(TINY, [*BF16, *OVERLAP, "run.world_size=2", *change.split()])
    plugins, plan = prepare(recipe)
    with pytest.raises(RecipeError) as refused:
        settle(plan, plugins, recipe)
    (problem,) = refused.value.problems
    assert REFUSED[change] in problem.message and problem.remedy and problem.place
