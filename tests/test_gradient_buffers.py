"""Positions in megatron-core's buffers: experts lie in one order, and all else is as core has it."""

from __future__ import annotations

import pytest

APART = "layer.experts.local_experts.{}.linear_fc{}.weight"
STACKED = "layer.experts.weight{}"
EXPERTS, INNER, HIDDEN = 4, 8, 16


def model(kind, inner=INNER, hidden=HIDDEN, dense=(3, 5)):
    """A dense weight, a layer's experts, a dense weight: name -> parameter."""
    import torch

    def weight(*shape, stacked=False):
        parameter = torch.nn.Parameter(torch.empty(shape))
        parameter.allreduce = len(shape) < 2
        if stacked:
            parameter.stacked = True
        return parameter

    found = {"before": weight(dense[0])}
    if kind == "stacked":
        found[STACKED.format(1)] = weight(EXPERTS, 2 * inner, hidden, stacked=True)
        found[STACKED.format(2)] = weight(EXPERTS, hidden, inner, stacked=True)
    for expert in range(EXPERTS if kind == "apart" else 0):
        found[APART.format(expert, 1)] = weight(2 * inner, hidden)
        found[APART.format(expert, 2)] = weight(hidden, inner)
    return found | {"after": weight(dense[1])}


class Named:
    """What of a module the layout reads."""

    def __init__(self, parameters):
        self.parameters_ = parameters

    def named_parameters(self):
        return self.parameters_.items()


def laid(kind, zero=True, bucket=None, own=False, ranks=2, **sizes):
    """(name, (start, stop, bucket)) in core's order, and (start, stop) of the buckets of each buffer."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from dsplugins import gradient_buffers

    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=zero, overlap_grad_reduce=bucket is not None, bucket_size=bucket
    )
    parameters = model(kind, **sizes)
    names = {parameter: name for name, parameter in parameters.items()}
    if own:
        found = DistributedOptimizer.compute_full_param_layout(
            list(names), bucket, ranks, ddp, expert_data_parallel_world_size=ranks
        )
    else:
        found = gradient_buffers.layout(Named(parameters), ddp, bucket, ranks, ranks)
    places = {
        names[parameter]: place
        for cut in found.layouts.values()
        for parameter, place in cut.param_index_map.items()
    }
    return list(places.items()), [cut.bucket_indices for cut in found.layouts.values()]


def of_one(workers, *given, **settings):
    return workers(1).run(laid, *given, **settings)[0]


@pytest.mark.parametrize("bucket", [None, 200])
@pytest.mark.parametrize("zero", [True, False])
def test_each_expert_lies_where_it_lies_in_a_stack(workers, zero, bucket):
    apart, ends = of_one(workers, "apart", zero=zero, bucket=bucket)
    stacked, same_ends = of_one(workers, "stacked", zero=zero, bucket=bucket)
    assert ends == same_ends
    apart, stacked = dict(apart), dict(stacked)
    for which, size in ((1, 2 * INNER * HIDDEN), (2, INNER * HIDDEN)):
        begin, end, of = stacked[STACKED.format(which)]
        assert end - begin == EXPERTS * size
        for expert in range(EXPERTS):
            start = begin + expert * size
            assert apart[APART.format(expert, which)] == (start, start + size, of)
    for name in ("before", "after"):
        assert apart[name] == stacked[name]


@pytest.mark.parametrize("settings", [{}, {"bucket": 100_000}])
def test_stacks_lie_as_core_has_them(workers, settings):
    assert of_one(workers, "stacked", **settings) == of_one(workers, "stacked", own=True, **settings)


@pytest.mark.parametrize("kind", ["apart", "stacked"])
def test_sizes_that_would_leave_holes_are_left_to_core(workers, kind):
    assert of_one(workers, kind, inner=6, hidden=6) == of_one(workers, kind, inner=6, hidden=6, own=True)


def test_core_goes_through_them_last_to_first(workers):
    """The optimizer's order, and with it that of the norm's sum, stays core's own."""
    apart, _ = of_one(workers, "apart")
    assert [name for name, _ in apart] == [name for name, _ in of_one(workers, "apart", own=True)[0]]


def test_a_layer_is_in_one_bucket(workers):
    """Its experts' gradients are there at about the same time, and core takes parameters in their order."""
    apart, _ = of_one(workers, "apart", bucket=200)
    assert len({bucket for name, (_, _, bucket) in apart if "experts" in name}) == 1


def bucket_groups(overrides):
    """How many groups of buckets this rank's wrapper has, and one that core makes by itself of the model."""
    from megatron.core.distributed import DistributedDataParallel
    from runs import assembled

    from dsplugins.model import bare

    with assembled(overrides) as run:
        (ours,) = run.chunks
        settings = run.settings
        plain = DistributedDataParallel(
            config=settings.model, ddp_config=settings.ddp, module=bare(ours), disable_bucketing=False
        )
        return [[len(x.bucket_groups), len(x.expert_parallel_bucket_groups)] for x in (ours, plain)]


def test_buckets_of_a_later_stage_are_sent_one_by_one(workers):
    """The last stage has MTP's copy of the embedding in a bucket of its own, which comes late."""
    overrides = ["parallel.pipeline=2", "plugins.adamw.overlap_grad_reduce=true"]
    *_, (ours, plain) = workers(4).run(bucket_groups, overrides)
    assert ours == plain and ours[0] > 1
