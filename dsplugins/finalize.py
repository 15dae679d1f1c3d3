"""What happens between backward and optimizer: one chain that the loop owns and prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper


class GradientChain:
    """Links in order: the pipeline schedule's gradient finalisation, then the routers' balance.

    Stands in megatron-core's `config.finalize_model_grads_func`, which each schedule calls at the end
    of its last backward.
    """

    def __init__(
        self,
        finalize_grads: Callable[..., None],
        balance: Callable[[bool], None],
        accepts: Callable[[Sequence[torch.Tensor]], bool] | None = None,
    ) -> None:
        self.finalize_grads, self.balance, self._accepts = finalize_grads, balance, accepts
        self.losses: list[torch.Tensor] = []
        """Of this step's micro-batches that ended on this rank, as they come."""
        self.accepted = True
        """Whether this step is to be used; decided before a bias moves."""
        self.calls = 0
        """How often it ran since it was made: once in each step, if the schedule does its duty."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        self.finalize_grads(*args, **kwargs)
        self.accepted = self.accepts()
        self.balance(self.accepted)

    def accepts(self) -> bool:
        """Whether losses and gradients, as they are now, are to be used; collective if there is a choice."""
        return self._accepts is None or self._accepts(self.losses)

    def __str__(self) -> str:
        first = getattr(self.finalize_grads, "__name__", type(self.finalize_grads).__name__)
        return " -> ".join(filter(None, [first, str(self.balance)]))


def all_finite(chunks: Sequence[Any], losses: Sequence[torch.Tensor]) -> bool:
    """Whether gradients and losses are finite on all ranks: one pass over them and one small all-reduce."""
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    sums = [buffer.grad_data.sum() for buffer in buffers]
    if "loss_values" in MTPLossLoggingHelper.tracker:
        sums.append(MTPLossLoggingHelper.tracker["loss_values"].sum())
    finite = torch.stack([value.float() for value in (*sums, *losses)]).isfinite().all()
    bad = (~finite).to(torch.int32)
    torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    return not bool(bad)
