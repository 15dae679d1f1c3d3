"""A look at the validation split, in any layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from dsplugins import randomness, routers
from dsplugins.batches import forward_step, micro_batches
from dsplugins.contracts import Evaluation
from dsplugins.model import bare

if TYPE_CHECKING:
    from dsplugins.assemble import Forward


class Heads:
    """Listens at the output layer of the last chunk: MTP's logits come first, the main model's last.

    Counts, over micro-batches, the positions where the token that MTP predicts two ahead is the one
    that the main model itself puts there (greedy, both fed with the true text): the acceptance of
    V3's speculative decoding (report, 5.4.3), teacher-forced. Of several depths, the first one's.
    """

    def __init__(self, chunk: Any, depths: int) -> None:
        self.mtp_loss = self.tokens = self.agreed = self.compared = 0.0
        self.labels: torch.Tensor | None = None
        """[B, S], of the micro-batch that is under way."""
        self._depths, self._heard = depths, 0
        self._drafted = torch.empty(0)
        self._handle = chunk.output_layer.register_forward_hook(self._listen)

    def remove(self) -> None:
        """Stop listening."""
        self._handle.remove()

    def _listen(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        # Looked at here and now: core's cross entropy is about to overwrite FP32 logits.
        heard, self._heard = self._heard, (self._heard + 1) % (self._depths + 1)
        if self._depths == 0 or self.labels is None or heard not in (0, self._depths):
            return
        logits = gather_from_tensor_model_parallel_region(output[0].detach())
        if heard == 0:
            self._count_mtp(logits)
        else:
            agreed = self._drafted[:-1] == logits.argmax(-1)[1:]
            self.agreed += float(agreed.sum())
            self.compared += agreed.numel()

    def _count_mtp(self, logits: torch.Tensor) -> None:
        """[S, B, V]; MTP at i and the main model at i + 1 predict the same token."""
        assert self.labels is not None
        targets = self.labels.transpose(0, 1)[1:].flatten()
        losses = torch.nn.functional.cross_entropy(
            logits[:-1].float().flatten(0, 1), targets, reduction="sum"
        )
        self.mtp_loss += float(losses)
        self.tokens += targets.numel()
        self._drafted = logits.argmax(-1)


class Loads:
    """Listens at the routers of this rank: tokens for each expert, which routers count in training only."""

    def __init__(self, config: Any, chunks: Sequence[torch.nn.Module], device: torch.device) -> None:
        self.names = routers.names(config)
        self.counts = torch.zeros(
            len(self.names), config.num_moe_experts or 0, dtype=torch.float64, device=device
        )
        """[L, E], of this rank's tokens only."""
        self._handles = [
            router.register_forward_hook(partial(self._count, self.names.index(name)))
            for name, router in routers.local(chunks)
        ]

    def remove(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()

    def _count(self, layer: int, router: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.counts[layer] += output[1].sum(dim=0)

    def by_layer(self, summed: torch.Tensor) -> dict[str, tuple[int, ...]] | None:
        """Counts [L, E] summed over all ranks, by name of the layer; None without experts."""
        rows = summed.round().to(torch.int64).tolist()
        return {name: tuple(row) for name, row in zip(self.names, rows, strict=True)} or None


def evaluate(run: Forward, step: int) -> Evaluation:
    """Losses, MTP's acceptance and the experts' load on the first `evaluate.sequences` validation samples.

    On all of them, if there are fewer. Collective over all ranks; `step` steps lie behind the weights.
    """
    randomness.seed(run.plan.train.seed, step, "evaluation")
    count = _micro_batches(run)
    last = next((bare(c) for c in run.chunks if getattr(bare(c), "post_process", False)), None)
    heads = Heads(last, getattr(last.config, "mtp_num_layers", None) or 0) if last is not None else None
    loads = Loads(run.settings.model, run.chunks, run.device)
    try:
        with evaluating(run.chunks):
            found = _forward(run, count, heads)
    finally:
        loads.remove()
        if heads is not None:
            heads.remove()
    sums = torch.zeros(6, dtype=torch.float64, device=run.device)
    if heads is not None:
        sums[:2] = torch.tensor([sum(float(row["loss"]) for row in found), len(found)])
        sums[2:] = torch.tensor([heads.mtp_loss, heads.tokens, heads.agreed, heads.compared])
    sums = torch.cat([sums, loads.counts.flatten()])
    torch.distributed.all_reduce(sums)
    loss, rows, mtp_loss, tokens, agreed, compared = sums[:6].tolist()
    counts = sums[6:].view_as(loads.counts)
    return Evaluation(
        step=step,
        loss=loss / rows,
        mtp_loss=mtp_loss / tokens if tokens else None,
        mtp_acceptance=agreed / compared if compared else None,
        sequences=count * run.plan.train.micro_batch * run.plan.layout.data,
        bits_per_byte=_bits_per_byte(loss / rows, run.data.facts),
        max_vio=routers.max_vio(counts) if loads.names else None,
        expert_load=loads.by_layer(counts),
    )


def _micro_batches(run: Forward) -> int:
    """How many each rank takes."""
    size, ranks = run.plan.train.micro_batch, run.plan.layout.data
    count = min(run.plan.evaluate.sequences, run.data.validation_size) // (size * ranks)
    assert count > 0, f"{run.data.validation_size} validation samples do not fill one micro-batch a rank"
    return count


def _forward(run: Forward, count: int, heads: Heads | None) -> list[dict[str, torch.Tensor]]:
    """`count` micro-batches a rank through the schedule; the losses of those that ended on this rank."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    size = run.plan.train.micro_batch

    def step_with_labels(batches: Iterator[Any], model: torch.nn.Module) -> Any:
        tokens, labels, positions = next(batches)
        if heads is not None:
            heads.labels = labels
        return forward_step(iter([(tokens, labels, positions)]), model)

    iterators = [
        micro_batches(run.data.validation, 0, count, size, rank, ranks, run.device) for _ in run.chunks
    ]
    return run.forward_backward(
        forward_step_func=step_with_labels,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(run.chunks),
        num_microbatches=count,
        seq_length=run.plan.data.seq_length,
        micro_batch_size=size,
        forward_only=True,
    )


def _bits_per_byte(loss: float, facts: Mapping[str, Any]) -> float | None:
    """`loss` nats a token over the validation text's bytes a token; None where the data doesn't tell."""
    tokens, size = facts.get("validation_tokens"), facts.get("validation_bytes")
    return loss / math.log(2) * tokens / size if tokens and size else None


@contextmanager
def evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients, and back to training."""
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for chunk in chunks:
            chunk.train()


__all__ = ["evaluate", "evaluating"]
