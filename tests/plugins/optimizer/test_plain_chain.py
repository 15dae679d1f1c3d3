"""Gradient norm and clipping: the numbers of core's own functions, bit for bit, without calling them.

Of experts held apart; those that `grouped` stacks are summed as if they were (test_stacked.py).
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from runs import SEQUENTIAL

LAYOUTS = {
    "dp2": ["parallel.tensor=1"],
    "tp2": ["parallel.tensor=2"],
    "ep2, all held by each": ["parallel.expert=2", "plugins.adamw.zero=false"],
    "pp2": ["parallel.pipeline=2"],
    "detached mtp": ["model.mtp_detach_heads=true"],
}


@pytest.mark.parametrize("sizes", [[], [1], [7, 1000, 65537], [3] * 40])
def test_the_norm_is_cores(single, sizes):
    import torch.distributed as dist
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    from dsplugins.plugins.optimizer.plain_chain import clip, norm

    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(size, generator=generator) for size in sizes]
    ours = norm(grads, dist.group.WORLD, torch.device("cpu"))
    assert ours == get_grad_norm_fp32(grads, grad_stats_parallel_group=dist.group.WORLD)
    for limit in (0.3, 1e9):
        theirs = [torch.nn.Parameter(grad.clone()) for grad in grads]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        clip_grad_by_total_norm_fp32(theirs, limit, ours)
        for parameter, grad in zip(theirs, grads, strict=True):
            clip(mine := grad.clone(), limit, ours)
            assert torch.equal(mine, parameter.grad)


def both(overrides):
    """(norm, kept apart, gradients as the update gets them) of one step by core's chain, and by ours."""
    from megatron.core.optimizer import ChainedOptimizer
    from runs import assembled

    from dsplugins.step import Progress, take_step

    with assembled([*SEQUENTIAL, *overrides, "optimizer.clip_grad=0.3"]) as run:
        ours, found = run.optimizer, []
        parts, parameters = ours.chained_optimizers, [p for chunk in run.chunks for p in chunk.parameters()]

        def step_of(chain, config):
            grads = []
            for part in parts:
                part.config = config

            def watched():
                held = [p for part in parts for p in part.get_parameters()]
                grads.extend(p.grad.clone() for p in held if p.grad is not None)
                return True

            chain._step = watched
            _, norm, _ = type(chain).step(chain)
            found.append((norm, dict(chain.grad_norms_by_group), grads))
            return True, norm, None

        def by_both():
            before = [p.main_grad.clone() for p in parameters]
            as_core_builds_it = copy.copy(ours.config)
            as_core_builds_it.clip_grad = 0.3
            step_of(ChainedOptimizer(parts), as_core_builds_it)
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.main_grad.copy_(grad)
            return step_of(ours, ours.config)

        ours.step = by_both
        take_step(run, Progress())
        return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_cores(workers, layout):
    """Norms over the right ranks, the same gradients; what core keeps apart by its own norm."""
    for (core_norm, core_apart, core_grads), (norm, apart, grads) in workers(2).run(both, LAYOUTS[layout]):
        assert norm == core_norm > 0.3 and apart == core_apart
        assert bool(apart) == (layout == "detached mtp")
        assert len(grads) == len(core_grads) > 0
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, core_grads, strict=True))


def test_nothing_is_clipped_at_zero(single):
    from dsplugins.plugins.optimizer.plain_chain import PlainChain

    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 100.0)
    part = SimpleNamespace(
        is_stub_optimizer=False,
        config=None,
        optimizer=SimpleNamespace(param_groups=[]),
        get_parameters=lambda: [parameter],
        get_grads_for_grad_norm=lambda name: [parameter.grad],
        get_grad_stats_parallel_group=lambda: torch.distributed.group.WORLD,
    )
    chain = PlainChain([part], 0.0, torch.device("cpu"), [])
    chain._should_defer_mxfp8_param_sync, chain._step = lambda: False, lambda: True
    assert chain.get_grad_norm() == pytest.approx(100 * 3**0.5) and chain.step_with_ready_grads()
    assert parameter.grad.tolist() == [100.0] * 3
