"""A step of dsplugins beside a step of a hand-written megatron-core loop over the same modules."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

from dsplugins.assemble import Assembly
from dsplugins.batches import forward_step, micro_batches
from dsplugins.bench.turns import Timed, in_turn
from dsplugins.routers import local
from dsplugins.step import Progress, take_step

WARM = 3
"""Steps of each kind before any is timed."""


def measure(run: Assembly, rounds: int) -> Timed:
    """Seconds of `rounds` steps of each kind, in turn; collective."""
    ours, plain = _ours(run), _hand_written(run)
    in_turn(ours, plain, WARM)
    return in_turn(ours, plain, rounds)


def _ours(run: Assembly) -> Callable[[], float]:
    """A step as a run takes it: schedules, hooks, summed numbers, everything."""
    progress = Progress()

    def step() -> float:
        nonlocal progress
        for config in run.configs:
            config.finalize_model_grads_func = run.chain
        began = time.perf_counter()
        taken = take_step(run, progress)
        run.plugins.event("ds_step_end", step=taken)
        progress = progress.after(taken)
        return time.perf_counter() - began

    return step


def _hand_written(run: Assembly) -> Callable[[], float]:
    """What somebody would write with megatron-core alone: no schedule, no hook, no number but the loss."""
    train, length = run.plan.train, run.plan.data.seq_length
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batch = int(train.global_batch.at(0, 0))
    count = batch // (train.micro_batch * ranks)
    routers = [router for _, router in local(run.chunks)]
    first = 0

    def finalize(model: Any, *args: Any, **kwargs: Any) -> None:
        finalize_model_grads(model, *args, **kwargs)
        _update_biases(routers)

    def step() -> float:
        nonlocal first
        for config in run.configs:
            config.finalize_model_grads_func = finalize
        began = time.perf_counter()
        for chunk in run.chunks:
            chunk.zero_grad_buffer()
        run.optimizer.zero_grad()
        data = [
            micro_batches(run.data.train, first, count, train.micro_batch, rank, ranks, run.device)
            for _ in run.chunks
        ]
        losses = run.forward_backward(
            forward_step_func=forward_step,
            data_iterator=data if len(data) > 1 else data[0],
            model=run.chunks,
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=train.micro_batch,
            forward_only=False,
        )
        run.optimizer.step()
        for row in losses:
            row["loss"].item()
        first += batch
        return time.perf_counter() - began

    return step


@torch.no_grad()
def _update_biases(routers: list[Any]) -> None:
    """As core does it for its own routers: one all-reduce of all counts, then the sign rule."""
    if not routers:
        return
    counts = torch.stack([router.local_tokens_per_expert for router in routers])
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(counts, group=group)
    for router, mine in zip(routers, counts, strict=True):
        if hasattr(router, "update_bias"):
            router.update_bias(mine)
        router.local_tokens_per_expert.zero_()


__all__ = ["measure"]
