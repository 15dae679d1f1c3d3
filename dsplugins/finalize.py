"""What happens between backward and optimizer: one chain that the loop owns and prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class GradientChain:
    """Links in order: the pipeline schedule's gradient finalisation, then the routers' balance.

    Stands in megatron-core's `config.finalize_model_grads_func`, which each schedule calls at the end
    of its last backward.
    """

    def __init__(
        self,
        finalize_grads: Callable[..., None],
        balance: Callable[[bool], None],
        accepts: Callable[[], bool] | None = None,
    ) -> None:
        self.finalize_grads, self.balance, self.accepts = finalize_grads, balance, accepts
        self.accepted = True
        """Whether this step's gradients are to be used; decided by `accepts` before a bias moves."""
        self.calls = 0
        """How often it ran since it was made: once in each step, if the schedule does its duty."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        self.finalize_grads(*args, **kwargs)
        self.accepted = self.accepts is None or self.accepts()
        self.balance(self.accepted)

    def __str__(self) -> str:
        first = getattr(self.finalize_grads, "__name__", type(self.finalize_grads).__name__)
        return " -> ".join(filter(None, [first, str(self.balance)]))


def gradients_finite(chunks: Sequence[Any]) -> bool:
    """Whether all gradients are finite on all ranks: one pass over them and one small all-reduce."""
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    sums = [buffer.grad_data.sum() for buffer in buffers]
    finite = torch.stack([value.float() for value in sums]).isfinite().all()
    bad = (~finite).to(torch.int32)
    torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    return not bool(bad)
