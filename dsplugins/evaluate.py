"""A look at the validation split, and a completion by the trained model, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from dsplugins.batches import forward_step, micro_batches
from dsplugins.contracts import Data, Evaluation, Plan
from dsplugins.model import bare

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Heads:
    """Listens at the output layer of the last chunk: MTP's logits come first, the main model's last.

    Counts, over micro-batches, the positions where the token that MTP predicts two ahead is the one
    that the main model itself puts there (greedy, both fed with the true text): the acceptance of
    V3's speculative decoding (report, 5.4.3), teacher-forced.
    """

    def __init__(self, chunk: Any, depths: int) -> None:
        self.depths, self.seen = depths, []  # type: ignore[var-annotated]
        self.mtp_loss = self.tokens = self.agreed = self.compared = 0.0
        self.labels: torch.Tensor | None = None
        self._handle = chunk.output_layer.register_forward_hook(self._listen)

    def remove(self) -> None:
        """Stop listening."""
        self._handle.remove()

    def _listen(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.seen.append(gather_from_tensor_model_parallel_region(output[0].detach()))
        if len(self.seen) == self.depths + 1:
            self._count(self.seen[0], self.seen[-1])
            self.seen.clear()

    def _count(self, mtp: torch.Tensor, main: torch.Tensor) -> None:
        """Both [S, B, V]; MTP at i and the main model at i + 1 predict the same token."""
        if self.depths == 0 or self.labels is None:
            return
        targets = self.labels.transpose(0, 1)[1:]
        losses = torch.nn.functional.cross_entropy(
            mtp[:-1].float().flatten(0, 1), targets.flatten(), reduction="sum"
        )
        self.mtp_loss += float(losses)
        self.tokens += targets.numel()
        agreed = mtp[:-1].argmax(-1) == main[1:].argmax(-1)
        self.agreed += float(agreed.sum())
        self.compared += agreed.numel()


def evaluate(
    plan: Plan,
    data: Data,
    chunks: Sequence[torch.nn.Module],
    forward_backward: Callable[..., list[Any]],
    step: int,
    device: torch.device,
) -> Evaluation:
    """Losses on the first `evaluate.sequences` validation samples (all, if there are fewer)."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    size = plan.train.micro_batch
    count = min(plan.evaluate.sequences, data.validation_size) // (size * ranks)
    assert count > 0, f"{data.validation_size} validation samples do not fill one micro-batch a rank"
    last = next((bare(c) for c in chunks if getattr(bare(c), "post_process", False)), None)
    heads = Heads(last, getattr(last.config, "mtp_num_layers", None) or 0) if last is not None else None

    def step_with_labels(batches: Iterator[Any], model: torch.nn.Module) -> Any:
        tokens, labels, positions = next(batches)
        if heads is not None:
            heads.labels = labels
        return forward_step(iter([(tokens, labels, positions)]), model)

    with evaluating(chunks):
        found = forward_backward(
            forward_step_func=step_with_labels,
            data_iterator=[
                micro_batches(data.validation, 0, count, size, rank, ranks, device) for _ in chunks
            ]
            if len(chunks) > 1
            else micro_batches(data.validation, 0, count, size, rank, ranks, device),
            model=list(chunks),
            num_microbatches=count,
            seq_length=plan.data.seq_length,
            micro_batch_size=size,
            forward_only=True,
        )
    totals = torch.zeros(6, dtype=torch.float64, device=device)
    if heads is not None:
        heads.remove()
        totals[:2] = torch.tensor([sum(float(row["loss"]) for row in found), len(found)])
        totals[2:] = torch.tensor([heads.mtp_loss, heads.tokens, heads.agreed, heads.compared])
    torch.distributed.all_reduce(totals)
    loss, rows, mtp_loss, tokens, agreed, compared = totals.tolist()
    return Evaluation(
        step=step,
        loss=loss / rows,
        mtp_loss=mtp_loss / tokens if tokens else None,
        mtp_acceptance=agreed / compared if compared else None,
        sequences=count * size * ranks,
    )


def complete(
    plan: Plan,
    prompt: Sequence[int],
    length: int,
    chunks: Sequence[torch.nn.Module],
    forward_backward: Callable[..., list[Any]],
    device: torch.device,
) -> list[int]:
    """`length` greedy tokens after `prompt`, each from a full forward pass in lock-step on all ranks."""
    tokens = list(prompt)[-(plan.data.seq_length - length) :]
    first = len(tokens)
    while len(tokens) < first + length:
        tokens.append(_next_token(plan, tokens, chunks, forward_backward, device))
    return tokens[first:]


def _next_token(
    plan: Plan,
    tokens: list[int],
    chunks: Sequence[torch.nn.Module],
    forward_backward: Any,
    device: torch.device,
) -> int:
    size, length = plan.train.micro_batch, plan.data.seq_length
    row = torch.zeros(size, length, dtype=torch.int64, device=device)
    row[:, : len(tokens)] = torch.tensor(tokens, device=device)
    positions = torch.arange(length, device=device).expand(size, -1)

    def step(_: Any, model: torch.nn.Module) -> Any:
        return model(row, positions, None), greedy

    def greedy(logits: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        whole = gather_from_tensor_model_parallel_region(logits[:1, len(tokens) - 1])
        return whole.argmax(-1)

    ways = parallel_state.get_pipeline_model_parallel_world_size()
    with evaluating(chunks):
        found = forward_backward(
            forward_step_func=step,
            data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
            model=list(chunks),
            num_microbatches=ways if len(chunks) > 1 else 1,
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    chosen = torch.zeros(1, dtype=torch.int64, device=device)
    if found:
        chosen[0] = found[0].item()
    # Only the last stage knows; every stage needs it for the next token.
    torch.distributed.all_reduce(
        chosen, op=torch.distributed.ReduceOp.MAX, group=parallel_state.get_pipeline_model_parallel_group()
    )
    return int(chosen)


def evaluating(chunks: Sequence[torch.nn.Module]) -> AbstractContextManager[None]:
    """Evaluation mode without gradients, and back to training."""
    from contextlib import contextmanager

    @contextmanager
    def mode() -> Iterator[None]:
        for chunk in chunks:
            chunk.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for chunk in chunks:
                chunk.train()

    return mode()


__all__ = ["Evaluation", "complete", "evaluate"]
