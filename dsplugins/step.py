"""One optimizer step: scheduled values, forward and backward, gradients, update, and its numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from dsplugins import randomness
from dsplugins.batches import Batch, forward_step, micro_batches
from dsplugins.contracts import Step
from dsplugins.failures import PluginFailure
from dsplugins.routers import max_vio

if TYPE_CHECKING:
    from dsplugins.assemble import Assembly


@dataclass(frozen=True)
class Progress:
    """What lies behind a run: all that the data order and the schedules depend on."""

    steps: int = 0
    sequences: int = 0
    tokens: int = 0
    """Not `sequences` times a length: that may have changed on the way."""

    def after(self, step: Step) -> Progress:
        """When that step has been taken."""
        return Progress(step.step, self.sequences + step.global_batch, step.tokens)


@dataclass(frozen=True)
class Sums:
    """A step's numbers over the whole cluster."""

    loss: float
    mtp_loss: float | None
    aux_loss: float | None
    expert_counts: torch.Tensor | None


def take_step(run: Assembly, progress: Progress) -> Step:
    """One step of `run` with `progress` behind it; collective over all ranks."""
    began = time.perf_counter()
    train, length = run.plan.train, run.plan.data.seq_length
    now = (progress.steps, progress.tokens)
    unit = train.micro_batch * run.plan.layout.data
    batch = train.global_batch.at_multiple(*now, train.multiple(unit))
    rate = train.learning_rate.at(*now)
    scheduled = {name: schedule.at(*now) for name, schedule in run.settings.scheduled.items()}
    _set(run, rate, scheduled)
    randomness.seed(train.seed, progress.steps + 1)
    losses = _forward_backward(run, progress.sequences, batch // unit)
    run.plugins.event("ds_grads_ready", step=progress.steps + 1, chunks=run.chunks)
    updated, norm = _update(run)
    sums = _sums(run, losses, batch // unit)
    run.platform.synchronize()
    return Step(
        step=progress.steps + 1,
        tokens=progress.tokens + batch * length,
        loss=sums.loss,
        mtp_loss=sums.mtp_loss,
        aux_loss=sums.aux_loss,
        grad_norm=norm,
        learning_rate=rate,
        global_batch=batch,
        scheduled=scheduled,
        expert_counts=sums.expert_counts,
        router_layers=run.balance.names,
        max_vio=max_vio(sums.expert_counts) if sums.expert_counts is not None else None,
        seconds=time.perf_counter() - began,
        skipped=not updated,
    )


def _set(run: Assembly, rate: float, scheduled: dict[str, float]) -> None:
    """This step's values, where megatron-core and torch read them."""
    for config in run.configs:
        for name, value in scheduled.items():
            setattr(config, name, value)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_mult", 1.0)


def _forward_backward(run: Assembly, first: int, count: int) -> list[dict[str, torch.Tensor]]:
    """`count` micro-batches a rank from sample `first` on; the losses of those that ended on this rank."""
    for chunk in run.chunks:
        chunk.zero_grad_buffer()
    run.optimizer.zero_grad()
    run.chain.losses.clear()
    train, finalized = run.plan.train, run.chain.calls
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    iterators = [
        micro_batches(run.data.train, first, count, train.micro_batch, rank, ranks, run.device)
        for _ in run.chunks
    ]
    losses = run.forward_backward(
        forward_step_func=_noting(run.chain.losses),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=run.chunks,
        num_microbatches=count,
        seq_length=run.plan.data.seq_length,
        micro_batch_size=train.micro_batch,
        forward_only=False,
    )
    _finalized_once(run, run.chain.calls - finalized)
    return losses


def _noting(losses: list[torch.Tensor]) -> Callable[..., tuple[torch.Tensor, Any]]:
    """`forward_step` whose losses also go into `losses`, where the end of backward finds them."""

    def step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        output, mean_loss = forward_step(batches, model)

        def noted(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss, told = mean_loss(output)
            losses.append(told["loss"])
            return loss, told

        return output, noted

    return step


def _finalized_once(run: Assembly, times: int) -> None:
    """Raise PluginFailure where gradients were left as each rank has them, or were reduced twice."""
    if times != 1:
        owner = run.plan.slots["schedule"]
        raise PluginFailure(
            f"plugin {owner} failed in forward_backward: it called config.finalize_model_grads_func {times} "
            "times in a step; once, after the last backward, is right"
        )


def _update(run: Assembly) -> tuple[bool, float]:
    """The optimizer's step: (whether it was taken, gradient norm before clipping)."""
    # Asked once more: plugins have had the gradients in their hands since (ds_grads_ready).
    if not (run.chain.accepted and run.chain.accepts()):
        return False, float("nan")
    # Without clipping some of core's optimizers give no norm, and others 0.
    unclipped = None if run.settings.optimizer.clip_grad else float(run.optimizer.get_grad_norm())
    updated, norm, _ = run.optimizer.step()
    return updated, float(norm) if unclipped is None else unclipped


def _sums(run: Assembly, losses: Sequence[dict[str, torch.Tensor]], count: int) -> Sums:
    """The same on every rank: one small all-reduce a step."""
    layout, balance = run.plan.layout, run.balance
    copies = layout.data * layout.context
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    sums = torch.zeros(3 + balance.counts.numel(), dtype=torch.float64, device=run.device)
    if first and losses:
        sums[0] = torch.stack([row["loss"] for row in losses]).double().mean() / copies
        tracker = MTPLossLoggingHelper.tracker
        if "loss_values" in tracker:
            sums[1] = tracker["loss_values"].double().mean() / count / copies
    if first and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        sums[2] = balance.aux / count / layout.data
        sums[3:] = balance.counts.flatten()
    MTPLossLoggingHelper.clean_metrics_in_tracker()
    if layout.world_size > 1:
        torch.distributed.all_reduce(sums)
    told = sums.cpu()
    loss, mtp, aux = told[:3].tolist()
    counts: Any = told[3:].round().to(torch.int64).view_as(balance.counts) if balance.names else None
    return Sums(
        loss=loss,
        mtp_loss=mtp if run.settings.model.mtp_num_layers else None,
        aux_loss=aux if balance.names else None,
        expert_counts=counts,
    )


__all__ = ["Progress", "take_step"]
