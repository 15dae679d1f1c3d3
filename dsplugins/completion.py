"""A completion by the trained model, token by token, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from dsplugins.evaluate import evaluating

if TYPE_CHECKING:
    from dsplugins.assemble import Assembly


TEMPERATURE = 0.7
"""Below one, likely tokens become more likely. The likeliest alone, again and again, is what a young model
writes for ever."""


def complete(run: Assembly, prompt: Sequence[int], length: int) -> list[int]:
    """`length` tokens after `prompt`, each drawn from a full forward pass in lock-step on all ranks.

    What is drawn depends on the model and `train.seed`, and on nothing else.
    """
    tokens = list(prompt)[-(run.plan.data.seq_length - length) :]
    first = len(tokens)
    while len(tokens) < first + length:
        tokens.append(_next_token(run, tokens))
    return tokens[first:]


def _next_token(run: Assembly, tokens: list[int]) -> int:
    size, length, chunks = run.plan.train.micro_batch, run.plan.data.seq_length, run.chunks
    row = torch.zeros(size, length, dtype=torch.int64, device=run.device)
    row[:, : len(tokens)] = torch.tensor(tokens, device=run.device)
    positions = torch.arange(length, device=run.device).expand(size, -1)

    def step(_: Any, model: torch.nn.Module) -> Any:
        return model(row, positions, None), draw

    def draw(logits: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        whole = gather_from_tensor_model_parallel_region(logits[0, len(tokens) - 1])
        return drawn(whole.float().cpu(), seed=run.plan.train.seed + len(tokens))

    # Chunks are taken in groups of micro-batches, and a group must be full.
    group = run.settings.model.microbatch_group_size_per_vp_stage
    ways = group or parallel_state.get_pipeline_model_parallel_world_size()
    with evaluating(chunks):
        found = run.forward_backward(
            forward_step_func=step,
            data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
            model=list(chunks),
            num_microbatches=ways if len(chunks) > 1 else 1,
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    chosen = torch.zeros(1, dtype=torch.int64, device=run.device)
    if found:
        chosen.fill_(found[0])
    # Only the last stage knows; every stage needs it for the next token.
    torch.distributed.all_reduce(
        chosen, op=torch.distributed.ReduceOp.MAX, group=parallel_state.get_pipeline_model_parallel_group()
    )
    return int(chosen)


def drawn(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """A token by the softmax of logits [V] / TEMPERATURE, the same for the same `seed` (Gumbel-max)."""
    generator = torch.Generator().manual_seed(seed)
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return (logits / TEMPERATURE + noise).argmax()


__all__ = ["complete"]
