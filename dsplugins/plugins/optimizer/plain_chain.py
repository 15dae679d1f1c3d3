"""Gradient norm and clipping in plain torch, whatever is installed.

megatron-core's clip_grads.py takes them from Transformer Engine, else from apex, else its own: a recipe then
rounds otherwise on another machine. Here the numbers are those of core's own functions, bit for bit,
summed over the same process groups; for experts in stacked weights, those of experts that are held apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from dsplugins.plugins.optimizer.stacked import Stacked


class PlainChain(ChainedOptimizer):
    """Core's chain of optimizers, with a norm and clipping of its own.

    The parts' `config.clip_grad` must be 0: core's `step` then leaves gradients as they are, and they are
    clipped when it is about to update.
    """

    def __init__(
        self,
        parts: list[MegatronOptimizer],
        limit: float,
        device: torch.device,
        chunks: Sequence[torch.nn.Module],
    ) -> None:
        super().__init__(parts)
        self._limit, self._device, self._norm = limit, device, 0.0
        self._stacked = [Stacked.of(part, chunks) for part in parts]

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Norm of all gradients but those that core keeps apart, such as of detached MTP heads."""
        self._norm = self._norm_of(None)
        return self._norm

    def _get_grad_norm_for_group(self, grad_norm_group: str) -> float:
        """Norm of those that are kept apart under this name."""
        return self._norm_of(grad_norm_group)

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Clip, then update: core's `step` has just asked for the norm."""
        if self._limit > 0.0:
            norms = {None: self._norm, **self._compute_grad_norms_by_group()}
            for parameter in self._parameters():
                clip(parameter.grad, self._limit, norms[getattr(parameter, "grad_norm_group", None)])
        updated: bool = super().step_with_ready_grads()
        return updated

    def _parameters(self) -> list[Any]:
        parts = [part for part in self.chained_optimizers if not part.is_stub_optimizer]
        return [parameter for part in parts for parameter in part.get_parameters()]

    def _norm_of(self, name: str | None) -> float:
        """Of all parts at once where they are summed over the same ranks, else of each."""
        parts = self.chained_optimizers
        grads = [
            stacked.apart(part.get_grads_for_grad_norm(name))
            for part, stacked in zip(parts, self._stacked, strict=True)
        ]
        groups = [part.get_grad_stats_parallel_group() for part in parts]
        if all(group == groups[0] for group in groups):
            return norm([grad for some in grads for grad in some], groups[0], self._device)
        norms = [norm(some, group, self._device) for some, group in zip(grads, groups, strict=True)]
        return math.sqrt(sum(each**2 for each in norms))


def norm(grads: Sequence[torch.Tensor], group: torch.distributed.ProcessGroup, device: torch.device) -> float:
    """Euclidean norm of FP32 gradients that are spread over `group`; collective."""
    squares = torch.zeros(1, dtype=torch.float32, device=device)
    if grads:
        # Together on the CPU, as core does: other kernels sum in another order.
        each = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).cpu()
        squares += torch.linalg.vector_norm(each).to(device) ** 2
    torch.distributed.all_reduce(squares, group=group)
    return float(squares) ** 0.5


def clip(grad: torch.Tensor | None, limit: float, total: float) -> None:
    """Scale a gradient, in place, so that a norm of `total` becomes `limit`; nothing where it is below."""
    factor = limit / (total + 1.0e-6)
    if grad is not None and factor < 1.0:
        grad.mul_(factor)


__all__ = ["PlainChain", "clip", "norm"]
