"""Samples by index -> micro-batches of a rank, the forward step and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def micro_batches(
    sample: Callable[[int], torch.Tensor],
    first: int,
    count: int,
    size: int,
    rank: int,
    ranks: int,
    device: Any,
) -> Iterator[Batch]:
    """(tokens, labels, positions), each [B, S], of data-parallel rank `rank` of `ranks`.

    The step takes samples `first` to `first + count * ranks * size`; which of them form one step does
    not depend on the layout.
    """
    for index in range(count):
        start = first + (index * ranks + rank) * size
        rows = torch.stack([sample(start + i) for i in range(size)]).to(device)
        positions = torch.arange(rows.shape[1] - 1, device=device).expand(size, -1)
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), positions


def mean_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean cross entropy of a micro-batch; megatron-core's two-part form of a loss function.

    The logged copy is cloned: core divides the first part in place.
    """
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """megatron-core's forward step: one micro-batch through one model chunk."""
    tokens, labels, positions = next(batches)
    return model(tokens, positions, None, labels=labels), mean_loss
